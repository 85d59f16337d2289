"""Every attack costs its sender alone: the server lives, other clients notice nothing, and nothing is left behind."""

from __future__ import annotations

import pytest

from shmtransport.memory.mapped_file import guards_are_on

from . import attacks, cuts, floods, intrusions, memory_attacks, stream_attacks
from .harness import Stage
from .scene import ATTACKS, Attack

TABLES = (attacks, intrusions, memory_attacks, floods, stream_attacks, cuts)
"""What fills ``ATTACKS``."""

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_an_attack_costs_its_sender_alone(stage: Stage, attack: Attack) -> None:
    """The attack itself checks what the attacker gets; the stage checks all others."""
    if attack.act.__module__ == cuts.__name__ and not guards_are_on():
        pytest.skip("there is no compiled core")
    stage.endure(attack)
