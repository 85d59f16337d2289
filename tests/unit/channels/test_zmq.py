"""The server's ZeroMQ channel: unread messages of peers, and malformed messages."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from shmtransport.channels.backlog import QUEUED_BYTES_LIMIT
from shmtransport.channels.zmq import ZmqServerChannel, _connection_of
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import Failure, Goodbye, Refused, Reply, Request, decode, encode, is_reply

MAX_MESSAGE_BYTES = 64 * 1024
ASK = (
    "import os, sys; from shmtransport.memory.owner_lock import holder; print(holder(os.open(sys.argv[1], 2)), end='')"
)
SMALL = encode(Reply(0, "x", ()))
LARGE = encode(Reply(0, "x" * (MAX_MESSAGE_BYTES - 20), ()))


@pytest.fixture
def server(address: str) -> Iterator[ZmqServerChannel]:
    made = ZmqServerChannel(address, MAX_MESSAGE_BYTES)
    yield made
    made.close()


@pytest.fixture
def peer(address: str) -> Iterator[Callable[[], zmq.Socket[bytes]]]:
    """Make sockets with small queues for unread messages."""
    context: zmq.Context[Any] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make() -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.rcvhwm = 1
        socket.connect(address)
        socket.send(b"hello")
        made.append(socket)
        return socket

    yield make
    for socket in made:
        socket.close()
    context.term()


def next_message(server: ZmqServerChannel) -> tuple[bytes, bytes]:
    while (received := server.receive()) is None:
        server.wait(10.0)
    return received


def taken(socket: zmq.Socket[bytes], server: ZmqServerChannel, count: int) -> list[bytes]:
    """Receive ``count`` messages in a thread, while the server acts as one that waits."""
    received: list[bytes] = []

    def take() -> None:
        while len(received) < count and socket.poll(10_000):
            received.append(socket.recv())

    thread = threading.Thread(target=take)
    thread.start()
    while thread.is_alive():
        server.wait(0.1)
        assert server.receive() is None
    thread.join()
    return received


def test_replies_that_nobody_reads_wait_in_order(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """The server keeps far more than ZeroMQ takes and sends it once the peer reads; it is told when to continue."""
    socket = peer()
    name, _ = next_message(server)
    messages = [encode(Reply(turn, "x" * (turn % 7 * 1000), ())) for turn in range(4000)]
    assert all(server.send(name, message) for message in messages)
    assert taken(socket, server, len(messages)) == messages


def test_replies_that_nobody_reads_are_bounded_in_bytes(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """A peer that never reads reaches the limit after some 20 MiB, not after 10 000 of the largest messages."""
    peer()
    name, _ = next_message(server)
    sent = 0
    while server.send(name, LARGE):
        sent += len(LARGE)
        assert sent < QUEUED_BYTES_LIMIT + (8 << 20)
    assert sent >= QUEUED_BYTES_LIMIT
    server.disconnect(name)
    assert not server._backlogs, "this much is not kept for a client that has left"


def test_one_that_does_not_read_disturbs_nobody(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """While one backlog waits, the server hears and answers the others."""
    peer()
    deaf, _ = next_message(server)
    while server.send(deaf, LARGE) and len(server._backlogs) == 0:
        pass
    other = peer()
    name, _ = next_message(server)
    for turn in range(50):
        other.send(b"%d" % turn)
        assert next_message(server) == (name, b"%d" % turn)
        assert server.send(name, SMALL)
        assert other.recv() == SMALL


def test_nothing_is_kept_for_strangers(server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]) -> None:
    """A refusal or goodbye that ZeroMQ has no room for is dropped: anyone can provoke one."""
    peer()
    name, _ = next_message(server)
    refusal = encode(Refused("x" * 4000))
    sent = 0
    while server.send(name, refusal):
        sent += 1
        assert sent < 10_000
    assert not server._backlogs


def test_a_goodbye_comes_after_the_replies_before_it(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """Also when those are still queued, and the peer is no longer a client."""
    socket = peer()
    name, _ = next_message(server)
    sent = 0
    while not server._backlogs:
        assert server.send(name, SMALL)
        sent += 1
    assert server.send(name, encode(Goodbye("enough")))
    server.disconnect(name)
    received = taken(socket, server, sent + 1)
    assert received == [SMALL] * sent + [encode(Goodbye("enough"))]


def test_a_goodbye_to_a_client_waits_where_zmq_has_no_more_room(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """Also where nothing waits yet: else a client whose queue is just full would wait for its replies in vain."""
    socket = peer()
    name, _ = next_message(server)
    server.know(name)
    sent = 0
    while server._send(name, LARGE):
        sent += 1
    assert not server._backlogs
    goodbye = encode(Goodbye("the server was shut down"))
    assert server.send(name, goodbye)
    server.disconnect(name)
    assert taken(socket, server, sent + 1)[-1] == goodbye


def test_closing_gives_those_that_read_a_moment_to_do_so(address: str, peer: Callable[[], zmq.Socket[bytes]]) -> None:
    """Without a reader, closing still ends: half a second for what waits here, and as much for ZeroMQ."""
    server = ZmqServerChannel(address, MAX_MESSAGE_BYTES)
    peer()
    name, _ = next_message(server)
    for _ in range(100):
        assert server.send(name, LARGE)
    assert server._backlogs
    started = time.monotonic()
    server.close()
    assert 0.4 < time.monotonic() - started < 5.0
    assert not server.send(name, SMALL)
    assert server.receive() is None


def test_closing_sends_what_waits_to_those_that_read(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """It sends what it can while it closes; only a few that the peer's ZeroMQ has no room for at the end are lost."""
    socket = peer()
    name, _ = next_message(server)
    messages = [encode(Reply(turn, "x" * 10_000, ())) for turn in range(500)]
    assert all(server.send(name, message) for message in messages)
    assert server._backlogs
    thread = threading.Thread(target=server.close)
    thread.start()
    received = []
    while socket.poll(1500):
        received.append(socket.recv())
    thread.join()
    assert received == messages[: len(received)]
    assert len(received) > len(messages) - 20


def test_a_message_in_several_parts_is_an_empty_one(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """The sender gets the same answer as for any malformed message; many of them delay no other client."""
    socket = peer()
    name, _ = next_message(server)
    for parts in ([b"one", b"two"], [b"", b"two"], [b"", b"", b""], [SMALL] * 100):
        socket.send_multipart(parts)
        assert next_message(server) == (name, b"")
    socket.send(b"whole")
    assert next_message(server) == (name, b"whole")


def test_replies_are_told_from_other_messages() -> None:
    """``is_reply`` judges a message by its encoded bytes."""
    assert all(is_reply(encode(message)) for message in (Reply(0, None, ()), Failure(1 << 40, "x", "x", "x" * 4000)))
    others = (Goodbye(""), Refused("x" * 300), Request(7, "x", [8], {}, ()))
    assert not any(is_reply(encode(message)) for message in others)
    assert isinstance(decode(SMALL), Reply)


def test_a_connection_that_libzmq_has_closed_is_looked_up_without_a_trace() -> None:
    """Its number may be a segment's by then: no process is found, that isn't kept open, and it stays locked."""

    class Frame:
        """A message of a connection whose descriptor has become that of a segment."""

        def __init__(self, descriptor: int) -> None:
            self._descriptor = descriptor

        def get(self, _option: int) -> int:
            return self._descriptor

    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def holder_elsewhere() -> int | None:
        """Which process holds the lock, as another process sees it."""
        asking = [sys.executable, "-c", ASK, f"/proc/{os.getpid()}/fd/{segment.fd}"]
        said = subprocess.run(asking, capture_output=True, text=True, timeout=30, check=True).stdout
        return None if said == "None" else int(said)

    segment = Segment.create(segment_layout(4096))
    before = open_descriptors()
    frame: Any = Frame(segment.fd)
    assert _connection_of(frame)[1] is None
    assert open_descriptors() == before
    assert holder_elsewhere() == os.getpid()
    segment.close()
    assert _connection_of(frame) == (None, None)
