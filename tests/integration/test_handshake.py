"""How a connection comes about: what is logged, versions, and servers that break the rules."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from shmtransport import Client, ConnectRefused, PeerDied, PeerProtocolError, Server
from shmtransport.core.layout import FORMAT_VERSION
from shmtransport.protocol.messages import MAGIC_BYTE, Attach, Goodbye, Message, Offer, Refused, Reply, Welcome, encode
from tests.support.helpers import MIB, Serve, echo
from tests.support.strangers import HELLO, Stranger

OTHER_VERSION = FORMAT_VERSION + 1


@contextlib.contextmanager
def answering(router: zmq.Socket[bytes], *answers: bytes) -> Iterator[None]:
    """Answer the next messages with these bytes, in a thread."""

    def answer() -> None:
        for data in answers:
            if router.poll(5000):
                identity, _ = router.recv_multipart()
                router.send_multipart([identity, data])

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    thread.join()


def versioned(message: Message, version: int) -> bytes:
    return bytes((MAGIC_BYTE, version)) + msgspec.msgpack.encode(message)


# Log lines


def test_connecting_is_one_log_line_on_each_side(serve: Serve, address: str, caplog: pytest.LogCaptureFixture) -> None:
    """The line gives address, ipc, the channel and both arena sizes: no guessing at what is in use."""
    caplog.set_level(logging.INFO, "shmtransport")
    serve(echo=echo)
    with Client(address, arena_bytes=2 * MIB, reply_arena_bytes=3 * MIB) as client:
        client.call("echo")
        assert (client.scheme, client.channel) == ("ipc", "zmq")
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
        mine = [line for line in lines if line.startswith("connected to")]
        theirs = [line for line in lines if " connected at " in line]
        assert (len(mine), len(theirs)) == (1, 1)
        for line in (mine[0], theirs[0]):
            for part in (address, "ipc", "zmq channel", "request arena 2.0 MiB", "reply arena 3.0 MiB"):
                assert part in line
            assert str(os.getpid()) in line


def test_no_log_line_and_no_error_names_a_segment(
    serve: Serve, address: str, caplog: pytest.LogCaptureFixture, stranger: Callable[[], Stranger]
) -> None:
    """Names of segments are secrets between two processes."""
    caplog.set_level(logging.DEBUG)
    serve(echo=echo)
    with Client(address) as client:
        client.call("echo")
    one = stranger()
    one.send(HELLO)
    one.receive()
    name = "/shmtransport-" + secrets.token_hex(16)
    one.send(Attach(name))
    answer = one.receive()
    assert isinstance(answer, Refused)
    assert "shmtransport-" not in answer.reason
    assert "shmtransport-" not in caplog.text


# Versions


def test_a_client_of_another_version_is_refused_in_words_it_can_read(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """Refused never changes its format; its reason names both versions and a remedy."""
    serve(echo=echo)
    one = stranger()
    one.send(versioned(HELLO, OTHER_VERSION))
    answer = one.receive()
    assert isinstance(answer, Refused)
    assert f"version {OTHER_VERSION}" in answer.reason
    assert f"{FORMAT_VERSION}" in answer.reason
    assert "install the same" in answer.reason
    with Client(address) as client:
        assert client.call("echo", 1) == 1


def test_a_server_of_another_version_is_reported_with_both_versions(
    fake_server: zmq.Socket[bytes], address: str
) -> None:
    """The client says which version each side speaks."""
    with (
        answering(fake_server, versioned(Offer(65536), OTHER_VERSION)),
        pytest.raises(
            (PeerProtocolError, ConnectRefused), match=rf"version {OTHER_VERSION}, this side {FORMAT_VERSION}"
        ),
    ):
        Client(address)


def test_a_refusal_by_a_server_of_another_version_is_readable(fake_server: zmq.Socket[bytes], address: str) -> None:
    """The other version's own words reach the user."""
    reason = f"the peer speaks format version {FORMAT_VERSION}, this side {OTHER_VERSION}"
    with answering(fake_server, versioned(Refused(reason), OTHER_VERSION)), pytest.raises(ConnectRefused, match=reason):
        Client(address)


# A server that breaks the rules


@pytest.mark.parametrize(
    "answers",
    [
        [b""],
        [b"HTTP/1.1 400 Bad Request"],
        [encode(Welcome("/shmtransport-" + "0" * 32))],
        [encode(Reply(0, None, ()))],
        [encode(HELLO)],
        [encode(Offer(65536)), encode(Offer(65536))],
        [encode(Offer(65536)), encode(Welcome("/shmtransport-" + "0" * 32))],
        [encode(Offer(65536)), encode(Welcome("/etc/passwd"))],
        [encode(Offer(65536)), encode(Welcome("../../etc/passwd"))],
    ],
)
def test_a_server_that_breaks_the_handshake_is_a_peer_protocol_error(
    fake_server: zmq.Socket[bytes], address: str, answers: list[bytes]
) -> None:
    """Whatever it answers, the client raises an error of this package and keeps nothing."""
    with answering(fake_server, *answers), pytest.raises((PeerProtocolError, PeerDied)):
        Client(address, connect_timeout_s=2.0)


@pytest.mark.parametrize("said_before", [[], [encode(Offer(65536))]], ids=["after Hello", "after Attach"])
def test_a_server_that_is_stopping_refuses_the_client(
    fake_server: zmq.Socket[bytes], address: str, said_before: list[bytes]
) -> None:
    """Its goodbye in the middle of the handshake is ConnectRefused, with its reason: another server may take over."""
    goodbye = encode(Goodbye("the server was shut down"))
    with (
        answering(fake_server, *said_before, goodbye),
        pytest.raises(ConnectRefused, match="handshake: the server was shut down"),
    ):
        Client(address, connect_timeout_s=2.0)


# A server that starts again


def test_a_server_that_does_not_know_the_client_any_more_says_so(address: str) -> None:
    """After a restart at the same address the old client's next call is PeerDied, not a silent time-out."""

    def start() -> tuple[Server, threading.Thread]:
        server = Server(address)
        server.register("echo", echo)
        thread = threading.Thread(target=server.serve)
        thread.start()
        return server, thread

    server, thread = start()
    client = Client(address, timeout_s=10.0)
    assert client.call("echo", 1) == 1
    server.stop()
    thread.join()
    server._channel.close()  # without a goodbye, as if it had crashed
    for one in list(server._connections.values()):
        server._drop(one, "crashed")
    server._at_drop.detach()
    server, thread = start()
    try:
        with pytest.raises(PeerDied, match="does not know"):
            client.call("echo", 2)
        with Client(address) as late:
            assert late.call("echo", 3) == 3
    finally:
        client.close()
        server.stop()
        thread.join()
        server.close()
