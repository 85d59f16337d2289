"""A peer passes off another process's segment as its own: it is not removed, and the other works on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from shmtransport import CHANNEL_KINDS, Client
from shmtransport.errors import TransportError
from shmtransport.memory.segment import SEGMENTS
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    Attach,
    ChannelKind,
    Hello,
    Offer,
    Refused,
    Welcome,
)
from tests.support.children import Child, Mother
from tests.support.process import ROOT

from .harness import Stage
from .peers import ARENA_BYTES, Impostor, Wire
from .servers import Lie, LyingServer

pytestmark = pytest.mark.timeout(60)

X = torch.arange(100, dtype=torch.uint8)


class Scenery:
    """Wires to servers; ``others`` is the address of one that is not attacked."""

    def __init__(self, others: str) -> None:
        self.others = others
        self._context: zmq.Context[Any] = zmq.Context()
        self._undo = contextlib.ExitStack()
        self._undo.callback(self._context.term)

    def wire(self, address: str) -> Wire:
        wire = Wire(self._context, address)
        self._undo.callback(wire.close)
        return wire

    def impostor(self, address: str, channel: ChannelKind) -> Impostor:
        impostor = Impostor(self.wire(address), channel)
        self._undo.callback(impostor.close)
        return impostor

    def close(self) -> None:
        self._undo.close()


@pytest.fixture
def scenery(mother: Mother, address: str) -> Iterator[Scenery]:
    server = Child(mother, ROOT / "tests/support/processes/server.py", f"{address}-others")
    server.wait_until_ready()
    scenery = Scenery(f"{address}-others")
    yield scenery
    scenery.close()
    server.end()


@pytest.fixture(params=CHANNEL_KINDS)
def channel(request: pytest.FixtureRequest) -> ChannelKind:
    kind: ChannelKind = request.param
    return kind


@contextlib.contextmanager
def owned_elsewhere(mother: Mother, channel: ChannelKind) -> Iterator[str]:
    """The name of a segment that another process has made, as a client does while it connects."""
    ring_bytes = DEFAULT_MAX_MESSAGE_BYTES if channel == "doorbell" else 0
    reader, writer = map(os.fdopen, os.pipe(), "rw")
    with reader:
        owner = Child(mother, Path(__file__).with_name("owner.py"), str(ARENA_BYTES), str(ring_bytes), said=reader)
    try:
        owner.wait_until_ready()
        yield owner.readline().strip()
        writer.close()
        assert owner.wait() == 0
    finally:
        writer.close()
        owner.end()


def test_a_client_names_the_segment_of_another_client(
    stage: Stage, mother: Mother, scenery: Scenery, channel: ChannelKind
) -> None:
    """Of one that is just connecting, elsewhere: refused, and the other's own server still finds it."""
    with stage.undisturbed(), owned_elsewhere(mother, channel) as segment:
        wire = scenery.wire(stage.address)
        assert isinstance(wire.ask(Hello(ARENA_BYTES, ARENA_BYTES, DEFAULT_MAX_MESSAGE_BYTES, channel)), Offer)
        answer = wire.ask(Attach(segment))
        assert isinstance(answer, Refused), answer
        assert "another process" in answer.reason
        stage.innocents[0].goes_on()
        assert Path(SEGMENTS.file(segment)).exists()
        wire.close()


def test_a_server_names_the_segment_of_another_server(scenery: Scenery, address: str, channel: ChannelKind) -> None:
    """Of one whose client is just connecting: that client still finds it, and is served."""
    neighbour = scenery.impostor(scenery.others, channel)
    file = Path(SEGMENTS.file(neighbour.replies.name))
    assert file.exists()
    lie = Lie("names of others", welcome=lambda _guest, _attach: Welcome(neighbour.replies.name))
    with (
        LyingServer(address, lie),
        contextlib.suppress(TransportError),
        Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=0.3) as client,
    ):
        client.call("echo", X)
    assert file.exists()
    neighbour.assert_served()
    with Client(scenery.others, channel=channel) as late:
        assert torch.equal(late.call("echo", X), X)
