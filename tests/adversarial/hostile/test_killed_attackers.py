"""Attackers in processes of their own, killed in the middle of an attack: the server frees what they held at once."""

from __future__ import annotations

import os
import signal

import pytest

from shmtransport import CHANNEL_KINDS
from shmtransport.protocol.messages import ChannelKind
from tests.support.children import Child, Mother
from tests.support.helpers import eventually
from tests.support.process import ROOT

from .harness import Stage

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("what", "channel"),
    [
        *(("too long", channel) for channel in CHANNEL_KINDS),
        ("unfinished", "zmq"),
        ("half a record", "doorbell"),
    ],
)
def test_a_killed_attacker_leaves_nothing(stage: Stage, mother: Mother, what: str, channel: ChannelKind) -> None:
    """One that ZeroMQ has cut off holds its share until its process ends, and no longer; so does one that just dies."""
    with stage.undisturbed():
        before = len(os.listdir(f"/proc/{stage.server.pid}/fd"))
        attacker = Child(mother, ROOT / "tests/support/processes/impostor.py", stage.address, channel, what)
        attacker.wait_until_ready()
        if what != "half a record":
            assert eventually(lambda: len(os.listdir(f"/proc/{stage.server.pid}/fd")) > before)
        attacker.signal(signal.SIGKILL)
        attacker.end()
        assert eventually(lambda: len(os.listdir(f"/proc/{stage.server.pid}/fd")) <= before)
