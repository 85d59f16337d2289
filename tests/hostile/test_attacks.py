"""Every attack costs its sender alone: the server lives, other clients notice nothing, and nothing is left behind."""

from __future__ import annotations

import pytest

from . import attacks, floods, intrusions, memory_attacks
from .harness import Stage
from .scene import ATTACKS, Attack, Scene

TABLES = (attacks, intrusions, memory_attacks, floods)
"""What fills ``ATTACKS``."""

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_an_attack_costs_its_sender_alone(stage: Stage, attack: Attack) -> None:
    """What the attacker gets, the attack itself asserts; what everyone else has, the stage."""
    with stage.undisturbed(attack.patience_s):
        scene = Scene(stage.address, stage.server.pid, attack.channel)
        try:
            attack.act(scene)
        finally:
            scene.close()
