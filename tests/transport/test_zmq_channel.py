"""The server's ZeroMQ channel: what peers leave unread, and messages that are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from shmtransport.backlog import QUEUED_BYTES_LIMIT
from shmtransport.message import Failure, Goodbye, Refused, Reply, Request, decode, encode, is_reply
from shmtransport.zmq_channel import ZmqServerChannel

MAX_MESSAGE_BYTES = 64 * 1024
SMALL = encode(Reply(0, "x", ()))
LARGE = encode(Reply(0, "x" * (MAX_MESSAGE_BYTES - 20), ()))


@pytest.fixture
def server(address: str) -> Iterator[ZmqServerChannel]:
    made = ZmqServerChannel(address, MAX_MESSAGE_BYTES)
    yield made
    made.close()


@pytest.fixture
def peer(address: str) -> Iterator[Callable[[], zmq.Socket[bytes]]]:
    """Make sockets that take little before they are read."""
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
    """Take so many messages in a thread, while the server does what one does that waits."""
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
    """Far more than ZeroMQ takes are kept, and come as soon as the peer reads; the server is told to go on."""
    socket = peer()
    name, _ = next_message(server)
    messages = [encode(Reply(turn, "x" * (turn % 7 * 1000), ())) for turn in range(4000)]
    assert all(server.send(name, message) for message in messages)
    assert taken(socket, server, len(messages)) == messages


def test_replies_that_nobody_reads_are_bounded_in_bytes(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """A peer that never reads has taken too much after some 20 MiB, not after 10 000 of the largest messages."""
    peer()
    name, _ = next_message(server)
    sent = 0
    while server.send(name, LARGE):
        sent += len(LARGE)
        assert sent < QUEUED_BYTES_LIMIT + (8 << 20)
    assert sent >= QUEUED_BYTES_LIMIT
    server.disconnect(name)
    assert not server._backlogs, "so much is not kept for who has left"


def test_one_that_does_not_read_disturbs_nobody(
    server: ZmqServerChannel, peer: Callable[[], zmq.Socket[bytes]]
) -> None:
    """While a backlog waits, others are heard and answered."""
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
    """Refusals and goodbyes that ZeroMQ has no room for are not sent: anyone can ask for them."""
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
    """Also where they wait, and the peer is a client no more."""
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


def test_closing_gives_those_that_read_a_moment_to_do_so(address: str, peer: Callable[[], zmq.Socket[bytes]]) -> None:
    """Where nobody reads, closing ends all the same: half a second for what waits here, and as much for ZeroMQ."""
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
    """All of it, in the time that closing takes; but for a few that the peer's ZeroMQ has no room for at the end."""
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
    """So its sender is told, as of any other that is none; and whoever sends many of them keeps nobody waiting."""
    socket = peer()
    name, _ = next_message(server)
    for parts in ([b"one", b"two"], [b"", b"two"], [b"", b"", b""], [SMALL] * 100):
        socket.send_multipart(parts)
        assert next_message(server) == (name, b"")
    socket.send(b"whole")
    assert next_message(server) == (name, b"whole")


def test_replies_are_told_from_other_messages() -> None:
    """By their bytes."""
    assert all(is_reply(encode(message)) for message in (Reply(0, None, ()), Failure(1 << 40, "x", "x", "x" * 4000)))
    others = (Goodbye(""), Refused("x" * 300), Request(7, "x", [8], {}, ()))
    assert not any(is_reply(encode(message)) for message in others)
    assert isinstance(decode(SMALL), Reply)
