"""What is done with streams and one-way calls costs its sender alone at the other kinds of server, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.children import Mother

from . import stream_attacks
from .harness import Stage
from .scene import ATTACKS, BOTH, Attack

KINDS = ("threads", "AsyncServer")
STREAM_ATTACKS = [attack for attack in ATTACKS if attack.act.__module__ == stream_attacks.__name__]
_ACTS = list(dict.fromkeys(attack.act for attack in STREAM_ATTACKS))
RUNS = [
    (kind, attack)
    for number, kind in enumerate(KINDS)
    for attack in STREAM_ATTACKS
    if attack.channel == BOTH[(_ACTS.index(attack.act) + number) % 2]
]
"""Each attack once at each kind of server, by one channel at one and by the other at the other."""

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def other_stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mother: Mother
) -> Iterator[Stage]:
    """A Server with several threads under attack, and an AsyncServer; ``stage`` has a Server with one."""
    stage = Stage(mother, f"ipc://{tmp_path_factory.mktemp('stage')}/server.ipc", request.param)
    yield stage
    stage.end()


@pytest.mark.parametrize(("other_stage", "attack"), RUNS, indirect=["other_stage"], ids=str)
def test_an_attack_by_streams_costs_its_sender_alone(other_stage: Stage, attack: Attack) -> None:
    """As ``test_attacks``, for the attacks of ``stream_attacks``."""
    other_stage.endure(attack)
