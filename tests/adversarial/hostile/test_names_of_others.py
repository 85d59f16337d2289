"""A peer passes off another process's segment or bell as its own: neither is removed, and the other works on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from shmtransport import CHANNEL_KINDS, Client
from shmtransport.errors import TransportError
from shmtransport.memory.bell import BELLS, Bell
from shmtransport.memory.segment import SEGMENTS, Segment
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    Attach,
    ChannelKind,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refused,
    Welcome,
)
from tests.support.children import Child, Mother
from tests.support.process import ROOT

from .attacks import NO_BELL, NOWHERE
from .harness import Stage
from .peers import ARENA_BYTES, Impostor, Wire
from .servers import Guest, Lie, LyingServer

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


def exist(*files: str) -> bool:
    return all(Path(file).exists() for file in files)


def attach_as(wire: Wire, segment: str, bell: str, channel: ChannelKind) -> None:
    """Name these as a client's own, then leave: at once after a refusal, otherwise after one more message."""
    assert isinstance(wire.ask(Hello(ARENA_BYTES, ARENA_BYTES, DEFAULT_MAX_MESSAGE_BYTES, channel)), Offer)
    answer = wire.ask(Attach(segment, bell))
    assert isinstance(answer, (Welcome, Refused)), answer
    if isinstance(answer, Welcome):
        wire.send(b"noise")
        wire.send(Goodbye(""))
    wire.close()


def test_a_client_names_the_bell_of_another_server(stage: Stage, scenery: Scenery) -> None:
    """That server's next clients connect through the bell: they still can."""
    with stage.undisturbed(), Client(scenery.others, channel="doorbell") as client:
        neighbour = scenery.impostor(scenery.others, "doorbell")
        file = BELLS.file(neighbour.server_bell.name)
        assert exist(file)
        segment = Segment.create(neighbour.layout)
        attach_as(scenery.wire(stage.address), segment.name, neighbour.server_bell.name, "doorbell")
        segment.close()
        stage.innocents[0].goes_on()
        assert exist(file)
        neighbour.assert_served()  # from here on it has no name that its server's end could leave behind
        assert torch.equal(client.call("echo", X), X)
        with Client(scenery.others, channel="doorbell") as late:
            assert torch.equal(late.call("echo", X), X)


@contextlib.contextmanager
def owned_elsewhere(mother: Mother, channel: ChannelKind) -> Iterator[tuple[str, str]]:
    """The names of a segment and a bell that another process has made, as a client does while it connects."""
    ring_bytes = DEFAULT_MAX_MESSAGE_BYTES if channel == "doorbell" else 0
    reader, writer = map(os.fdopen, os.pipe(), "rw")
    with reader:
        owner = Child(mother, Path(__file__).with_name("owner.py"), str(ARENA_BYTES), str(ring_bytes), said=reader)
    try:
        owner.wait_until_ready()
        segment, bell = owner.readline().split()
        yield segment, bell
        writer.close()
        assert owner.wait() == 0
    finally:
        writer.close()
        owner.end()


def test_a_client_names_the_segment_and_the_bell_of_another_client(
    stage: Stage, mother: Mother, scenery: Scenery, channel: ChannelKind
) -> None:
    """Of one that is just connecting, elsewhere: refused, and the other's own server still finds both."""
    with stage.undisturbed(), owned_elsewhere(mother, channel) as (segment, bell):
        wire = scenery.wire(stage.address)
        assert isinstance(wire.ask(Hello(ARENA_BYTES, ARENA_BYTES, DEFAULT_MAX_MESSAGE_BYTES, channel)), Offer)
        answer = wire.ask(Attach(segment, bell if channel == "doorbell" else ""))
        assert isinstance(answer, Refused), answer
        assert "another process" in answer.reason
        stage.innocents[0].goes_on()
        assert exist(SEGMENTS.file(segment), BELLS.file(bell))
        wire.close()


def test_a_server_names_the_segment_and_the_bell_of_another_server(
    scenery: Scenery, address: str, channel: ChannelKind
) -> None:
    """Of one whose client is just connecting: that client still finds both, and is served."""
    neighbour = scenery.impostor(scenery.others, channel)
    bell = neighbour.server_bell.name if channel == "doorbell" else ""
    files = [SEGMENTS.file(neighbour.replies.name), *([BELLS.file(bell)] if bell else [])]
    assert exist(*files)
    lie = Lie("names of others", welcome=lambda _guest, _attach: Welcome(neighbour.replies.name, bell))
    with (
        LyingServer(address, lie),
        contextlib.suppress(TransportError),
        Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=0.3) as client,
    ):
        client.call("echo", X)
    assert exist(*files)
    neighbour.assert_served()
    with Client(scenery.others, channel=channel) as late:
        assert torch.equal(late.call("echo", X), X)


@pytest.mark.parametrize("which", ["the bell", "the bell, and no segment", "the segment, and no bell"])
def test_a_server_names_one_of_another_servers_two(scenery: Scenery, address: str, which: str) -> None:
    """Beside one of its own, or a missing one; the client then tidies up after the lying server."""
    neighbour = scenery.impostor(scenery.others, "doorbell")
    segment, bell = neighbour.replies.name, neighbour.server_bell.name
    named: Callable[[Guest, Attach], Message] = {
        "the bell": lambda guest, _attach: Welcome(guest.segment.name, bell),
        "the bell, and no segment": lambda _guest, _attach: Welcome(NOWHERE, bell),
        "the segment, and no bell": lambda _guest, _attach: Welcome(segment, NO_BELL),
    }[which]
    with (
        LyingServer(address, Lie(which, welcome=named)),
        contextlib.suppress(TransportError),
        Client(address, channel="doorbell", arena_bytes=ARENA_BYTES, timeout_s=0.3) as client,
    ):
        client.call("echo", X)
    assert exist(SEGMENTS.file(segment), BELLS.file(bell))
    neighbour.assert_served()
    Bell.open(bell).close()
