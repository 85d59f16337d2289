"""How a connection comes about: limits, versions, addresses, and strangers who break the rules."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import posix_ipc
import pytest
import torch
import zmq

from shmtransport import (
    AddressError,
    Client,
    ConnectRefused,
    ConnectTimeout,
    PeerDied,
    PeerProtocolError,
    SegmentError,
    Server,
    TransportError,
)
from shmtransport.connection import segment_layout
from shmtransport.descriptor import TensorDescriptor
from shmtransport.layout import FORMAT_VERSION
from shmtransport.message import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAGIC_BYTE,
    AnyMessage,
    Attach,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refused,
    Reply,
    Request,
    Welcome,
    decode,
    encode,
)
from shmtransport.segment import Segment

MIB = 1 << 20
OTHER_VERSION = FORMAT_VERSION + 1
Serve = Callable[..., Server]


def hello(arena_bytes: int) -> Hello:
    """A proper first message that asks for two arenas of this size."""
    return Hello(arena_bytes, arena_bytes, DEFAULT_MAX_MESSAGE_BYTES)


HELLO = hello(4096)


class Stranger:
    """A bare DEALER socket that says what it likes."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 1000
        self._socket.connect(address)

    def send(self, *frames: bytes | Message) -> None:
        self._socket.send_multipart([frame if isinstance(frame, bytes) else encode(frame) for frame in frames])

    def receive_bytes(self, timeout_s: float = 5.0) -> bytes | None:
        return self._socket.recv() if self._socket.poll(int(timeout_s * 1000)) else None

    def receive(self, timeout_s: float = 5.0) -> AnyMessage | None:
        data = self.receive_bytes(timeout_s)
        return None if data is None else decode(data)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def stranger(address: str) -> Iterator[Callable[[], Stranger]]:
    """Make bare sockets that are connected to the test's server."""
    made: list[Stranger] = []

    def make() -> Stranger:
        made.append(Stranger(address))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def fake_server(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A bare ROUTER socket where a server should be."""
    context = zmq.Context()
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.linger = 1000
    router.bind(address)
    yield router
    router.close()
    context.term()


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


def echo(value: Any = None) -> Any:
    return value


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# Limits


def test_arenas_beyond_a_clients_limit_are_refused_with_figures(serve: Serve, address: str) -> None:
    """max_arena_bytes bounds both arenas together; the message says asked and limit; the limit itself is granted."""
    serve({"max_arena_bytes": 4 * MIB}, echo=echo)
    with pytest.raises(ConnectRefused, match=r"6\.0 MiB.*max_arena_bytes is 4\.0 MiB"):
        Client(address, arena_bytes=3 * MIB)
    with pytest.raises(ConnectRefused, match=r"5\.0 MiB.*max_arena_bytes is 4\.0 MiB"):
        Client(address, arena_bytes=MIB, reply_arena_bytes=4 * MIB)
    with Client(address, arena_bytes=3 * MIB, reply_arena_bytes=MIB) as client:
        assert client.call("echo", torch.ones(3)).tolist() == [1, 1, 1]


def test_arenas_beyond_what_all_clients_may_have_are_refused_until_one_leaves(serve: Serve, address: str) -> None:
    """max_total_arena_bytes counts what is held now; a client that leaves gives its share back."""
    serve({"max_total_arena_bytes": 4 * MIB}, echo=echo)
    first = Client(address, arena_bytes=MIB)
    with pytest.raises(ConnectRefused, match=r"4\.0 MiB .*1 clients hold 2\.0 MiB of the 4\.0 MiB.*max_total_arena"):
        Client(address, arena_bytes=2 * MIB)
    with Client(address, arena_bytes=MIB) as second:
        assert second.call("echo", 2) == 2
        with pytest.raises(ConnectRefused):
            Client(address, arena_bytes=4096)
    first.close()
    with Client(address, arena_bytes=2 * MIB) as whole:
        assert whole.call("echo", 3) == 3


def test_more_clients_than_the_limit_are_refused_until_one_leaves(serve: Serve, address: str) -> None:
    """max_clients counts who is connected now; those who are stay undisturbed."""
    serve({"max_clients": 2}, echo=echo)
    first, second = Client(address), Client(address)
    with pytest.raises(ConnectRefused, match=r"2.*max_clients"):
        Client(address)
    assert (first.call("echo", 1), second.call("echo", 2)) == (1, 2)
    first.close()
    with Client(address) as third:
        assert third.call("echo", 3) == 3
    second.close()


@pytest.mark.parametrize("arena_bytes", [-1, 1 << 70])
def test_a_nonsensical_arena_size_is_an_error_of_this_package(serve: Serve, address: str, arena_bytes: int) -> None:
    """Never an OverflowError or a server that ends."""
    serve(echo=echo)
    with pytest.raises(TransportError):
        Client(address, arena_bytes=arena_bytes)
    with Client(address) as client:
        assert client.call("echo", 1) == 1


def test_an_arena_that_dev_shm_cant_hold_is_a_segment_error_with_figures(serve: Serve, address: str) -> None:
    """Room is reserved at creation: the error says free, asked and remedy, and nothing stays behind."""
    shm = os.statvfs("/dev/shm")
    too_much = 2 * shm.f_blocks * shm.f_frsize
    serve({"max_arena_bytes": 4 * too_much, "max_total_arena_bytes": 4 * too_much}, echo=echo)
    with pytest.raises(SegmentError, match=r"/dev/shm has [\d.]+ MiB free of [\d.]+ MiB.*asked for.*arena_bytes"):
        Client(address, arena_bytes=too_much, reply_arena_bytes=MIB)
    with pytest.raises(ConnectRefused, match=r"/dev/shm has [\d.]+ MiB free of [\d.]+ MiB.*asked for"):
        Client(address, arena_bytes=MIB, reply_arena_bytes=too_much)
    with Client(address, arena_bytes=MIB) as client:
        assert client.call("echo", 1) == 1


def test_a_client_whose_connecting_failed_takes_no_share_of_the_limits(serve: Serve, address: str) -> None:
    """A client that gave up after the server's offer says so; its share isn't kept until a time-out."""
    shm = os.statvfs("/dev/shm")
    too_much = 2 * shm.f_blocks * shm.f_frsize
    serve({"max_arena_bytes": 2 * too_much, "max_total_arena_bytes": too_much + MIB}, echo=echo)
    with pytest.raises(SegmentError):
        Client(address, arena_bytes=too_much, reply_arena_bytes=4096)
    with Client(address, arena_bytes=MIB) as client:
        assert client.call("echo", 1) == 1


def test_a_client_that_gave_up_connecting_takes_no_share_of_the_limits(serve: Serve, address: str) -> None:
    """A Hello that a busy server reads after its sender has left reserves nothing: the offer can't be delivered."""
    go = threading.Event()
    serve({"max_total_arena_bytes": 4 * MIB}, wait=lambda: go.wait(10), echo=echo)
    with Client(address, arena_bytes=4096) as busy:
        pending = busy.submit("wait")
        with pytest.raises(ConnectTimeout):
            Client(address, arena_bytes=MIB, connect_timeout_s=0.2)
        go.set()
        assert pending.result() is True
        with Client(address, arena_bytes=MIB + MIB // 2) as client:
            assert client.call("echo", 1) == 1


# Addresses


def test_nobody_at_the_address_is_a_timeout_that_names_it_and_a_remedy(address: str) -> None:
    """Not an endless wait; also where a dead server has left its socket file."""
    with pytest.raises(ConnectTimeout, match=r"server\.ipc within 0\.2 s: start one") as caught:
        Client(address, connect_timeout_s=0.2)
    assert address in str(caught.value)
    assert isinstance(caught.value, TimeoutError)


def test_a_second_server_at_the_address_is_refused_and_the_first_undisturbed(serve: Serve, address: str) -> None:
    """AddressError names the address; the living server keeps its socket."""
    serve(echo=echo)
    with Client(address) as client:
        with pytest.raises(AddressError, match="another server is already listening"):
            Server(address)
        assert client.call("echo", 1) == 1
        with Client(address) as late:
            assert late.call("echo", 2) == 2


def test_a_dead_servers_socket_file_is_replaced(serve: Serve, address: str, directory: Path) -> None:
    """What a killed server left behind doesn't keep a new one from starting."""
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(f"{directory}/server.ipc")
    dead.close()
    assert (directory / "server.ipc").is_socket()
    serve(echo=echo)
    with Client(address) as client:
        assert client.call("echo", 1) == 1


def test_a_file_that_is_no_socket_is_never_removed(address: str, directory: Path) -> None:
    """A mistyped address costs nobody a file."""
    (directory / "server.ipc").write_text("precious")
    with pytest.raises(AddressError, match="no socket"):
        Server(address)
    assert (directory / "server.ipc").read_text() == "precious"


def test_the_socket_is_its_owners_alone_and_goes_with_the_server(address: str, directory: Path) -> None:
    """Mode 0600 while it is there; removed in order."""
    with Server(address):
        assert stat.S_IMODE((directory / "server.ipc").stat().st_mode) == 0o600
    assert not (directory / "server.ipc").exists()


@pytest.mark.parametrize(
    "bad",
    [
        "tcp://*:5555",
        "tcp://0.0.0.0:5555",
        "tcp://[::]:5555",
        "tcp://192.0.2.1:5555",
        "ipc://relative/path",
        "ipc:///tmp/" + "x" * 200,
        "ipc:///no/such/directory/server.ipc",
        "inproc://x",
        "/tmp/worker.ipc",
        "",
    ],
)
def test_an_address_that_is_unsafe_or_malformed_is_refused(bad: str) -> None:
    """A server never listens on all interfaces, nor anywhere it wasn't told."""
    with pytest.raises(AddressError):
        Server(bad)


def test_tcp_on_the_loopback_works_and_says_so(serve: Serve) -> None:
    """The transport that is really used is known on both sides: "tcp", not "ipc"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with Server(address) as server:
        server.register("echo", echo)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            with Client(address) as client:
                assert client.call("echo", torch.ones(2)).tolist() == [1, 1]
                assert client.transport == server.transport == "tcp"
        finally:
            server.stop()
            thread.join()


def test_connecting_is_one_log_line_on_each_side(serve: Serve, address: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says address, ipc, the channel and both arena sizes: nobody has to guess what is in use."""
    caplog.set_level(logging.INFO, "shmtransport")
    serve(echo=echo)
    with Client(address, arena_bytes=2 * MIB, reply_arena_bytes=3 * MIB) as client:
        client.call("echo")
        assert (client.transport, client.channel) == ("ipc", "zmq")
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
        [encode(Offer(65536)), encode(Goodbye("no"))],
    ],
)
def test_a_server_that_breaks_the_handshake_is_a_peer_protocol_error(
    fake_server: zmq.Socket[bytes], address: str, answers: list[bytes]
) -> None:
    """Whatever it answers, the client raises an error of this package and keeps nothing."""
    with answering(fake_server, *answers), pytest.raises((PeerProtocolError, PeerDied)):
        Client(address, connect_timeout_s=2.0)


# Clients that break the rules

SEGMENT = "/shmtransport-" + "0" * 32
WRONG = {
    "nothing": [b""],
    "noise": [b"\x00" * 64, os.urandom(300), b"\xff" * 5000],
    "a magic byte alone": [bytes((MAGIC_BYTE,))],
    "an empty message": [bytes((MAGIC_BYTE, FORMAT_VERSION))],
    "deep nesting": [bytes((MAGIC_BYTE, FORMAT_VERSION)) + b"\x91" * 5000],
    "a length that lies": [bytes((MAGIC_BYTE, FORMAT_VERSION)) + b"\xdd\xff\xff\xff\xff"],
    "a truncated hello": [encode(HELLO)[:-1]],
    "a request first": [encode(Request(0, "echo", [], {}, ()))],
    "attach first": [encode(Attach(SEGMENT))],
    "a server's words": [encode(Offer(1)), encode(Welcome(SEGMENT)), encode(Refused("no")), encode(Reply(0, 1, ()))],
    "hello twice": [encode(HELLO)] * 3,
    "attach to nothing": [encode(HELLO), encode(Attach(SEGMENT))],
    "attach elsewhere": [encode(HELLO), encode(Attach("/../../etc/passwd"))],
    "request after hello": [encode(HELLO), encode(Request(0, "echo", [], {}, ()))],
    "goodbye first": [encode(Goodbye(""))],
    "too long a message": [encode(HELLO), b"\xd5" * 1_000_000],
}


def test_strangers_breaking_the_rules_never_disturb_another_client(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """Every kind of wrong message, again and again, while a client's calls run with all contents checked."""
    serve(double=lambda x: x * 2)
    stop = threading.Event()
    checked = 0

    def work() -> None:
        nonlocal checked
        with Client(address, arena_bytes=MIB) as client:
            while not stop.is_set():
                x = torch.full((1000,), float(checked))
                assert torch.equal(client.call("double", x), x * 2)
                checked += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert eventually(lambda: checked > 0)
        for _ in range(3):
            for messages in WRONG.values():
                one = stranger()
                for message in messages:
                    one.send(message)
            several_parts = stranger()
            several_parts.send(b"one", b"two")
            several_parts.send(b"", b"", b"")
        before = checked
        assert eventually(lambda: checked > before + 20)
        with Client(address, connect_timeout_s=5.0) as late:
            assert late.call("double", torch.ones(2)).tolist() == [2, 2]
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("what", [key for key in WRONG if key not in ("too long a message", "goodbye first")])
def test_a_wrong_message_is_answered_with_a_reason(serve: Serve, stranger: Callable[[], Stranger], what: str) -> None:
    """The sender is told Refused or Goodbye; the reason names no path and no segment."""
    serve(echo=echo)
    one = stranger()
    for message in WRONG[what]:
        one.send(message)
    answers: list[AnyMessage | None] = [one.receive()]
    while not isinstance(answers[-1], (Refused, Goodbye)):
        assert answers[-1] is not None, "no answer"
        answers.append(one.receive())
    reason = answers[-1].reason
    assert reason
    assert "shmtransport-" not in reason
    assert "passwd" not in reason


class Intruder(Stranger):
    """A stranger that has finished the handshake and then breaks the rules."""

    def __init__(self, address: str, arena_bytes: int = 64 * 1024) -> None:
        super().__init__(address)
        self.send(hello(arena_bytes))
        assert isinstance(self.receive(), Offer)
        self.segment = Segment.create(segment_layout(arena_bytes))
        self.send(Attach(self.segment.name))
        welcome = self.receive()
        assert isinstance(welcome, Welcome)
        self.replies = Segment.attach(welcome.segment, segment_layout(arena_bytes))

    def close(self) -> None:
        self.segment.close()
        self.replies.close()
        super().close()


def tensor(offset: int, shape: tuple[int, ...], dtype: str = "uint8", slot: int = 0, sequence: int = 1) -> bytes:
    ext = msgspec.msgpack.Ext(1, b"\x00\x00")
    return encode(Request(0, "echo", [ext], {}, (TensorDescriptor(offset, shape, dtype, slot, sequence),)))


INTRUSIONS = {
    "beyond the data": tensor(64 * 1024 - 4, (8,)),
    "a shape that overflows": tensor(0, (2**62, 2**62, 2**62)),
    "unknown dtype": tensor(0, (1,), "object"),
    "misaligned": tensor(1, (1,), "float32"),
    "slot out of range": tensor(0, (1,), slot=1 << 40),
    "sequence zero": tensor(0, (1,), sequence=0),
    "an index that names no tensor": encode(Request(0, "echo", [msgspec.msgpack.Ext(1, b"\x05\x00")], {}, ())),
    "an unknown extension": encode(Request(0, "echo", [msgspec.msgpack.Ext(77, b"\x00\x00")], {}, ())),
    "a marker out of place": encode(Request(0, "echo", [1, msgspec.msgpack.Ext(3, b"")], {}, ())),
    "numpy of bfloat16": encode(
        Request(0, "echo", [msgspec.msgpack.Ext(2, b"\0\0")], {}, (TensorDescriptor(0, (1,), "bfloat16", 0, 1),))
    ),
    "a key that is bytes": encode(Request(0, "echo", [{b"key": 1}], {}, ())),
    "depth": bytes((MAGIC_BYTE, FORMAT_VERSION)) + msgspec.msgpack.encode([6, 0, "echo"]) + b"\x91" * 100,
    "hello again": encode(HELLO),
    "attach again": encode(Attach(SEGMENT)),
    "a reply": encode(Reply(0, None, ())),
    "noise": b"\xd5\x01noise",
    "nothing": b"",
}


@pytest.mark.parametrize("what", INTRUSIONS)
def test_a_connected_client_that_breaks_the_rules_loses_its_connection_only(
    serve: Serve, address: str, what: str
) -> None:
    """It gets Goodbye with a reason, is dropped once, and another client goes on."""
    gone: list[int] = []
    server = serve(echo=echo)
    server.on_disconnect(gone.append)
    with Client(address, arena_bytes=64 * 1024) as other:
        other.call("echo", 0)
        intruder = Intruder(address)
        try:
            intruder.send(INTRUSIONS[what])
            answer = intruder.receive()
            assert isinstance(answer, Goodbye)
            assert answer.reason
            assert eventually(lambda: len(gone) == 1)
            intruder.send(encode(Request(1, "echo", [1], {}, ())))
            assert isinstance(intruder.receive(), Goodbye), "it is no client any more"
        finally:
            intruder.close()
        assert other.call("echo", torch.arange(3)).tolist() == [0, 1, 2]
        assert len(gone) == 1


def test_a_segment_that_cant_be_mapped_costs_its_sender_the_connection_only(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """A segment whose header claims an absurd size, and which really has it (sparse), can't end the server."""
    serve(echo=echo)
    layout = segment_layout((1 << 50) - 9 * 4096)
    name = "/shmtransport-" + secrets.token_hex(16)
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    try:
        os.ftruncate(memory.fd, layout.total_bytes)
        os.pwrite(memory.fd, layout.header(), 0)
        one = stranger()
        one.send(HELLO)
        assert isinstance(one.receive(), Offer)
        one.send(Attach(name))
        answer = one.receive(2.0)
        with Client(address, connect_timeout_s=2.0) as client:
            assert client.call("echo", 1) == 1
        assert isinstance(answer, Refused)
    finally:
        os.close(memory.fd)
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)


def test_a_segment_that_nobody_holds_is_refused(serve: Serve, address: str, stranger: Callable[[], Stranger]) -> None:
    """A client whose end the kernel wouldn't tell gets no connection: it could hold its share for ever."""
    server = serve({"max_clients": 1}, echo=echo)
    layout = segment_layout(4096)
    name = "/shmtransport-" + secrets.token_hex(16)
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=layout.total_bytes)
    try:
        os.pwrite(memory.fd, layout.header(), 0)
        one = stranger()
        one.send(HELLO)
        assert isinstance(one.receive(), Offer)
        one.send(Attach(name))
        answer = one.receive()
        assert isinstance(answer, Refused)
        assert "lock" in answer.reason
        with Client(address) as client:
            assert client.call("echo", 1) == 1
        assert server.statistics().calls == 1
    finally:
        os.close(memory.fd)
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)


def test_hellos_that_never_finish_are_bounded_and_forgotten(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """A flood gets no further than max_clients, allocates nothing, and after the time-out a client gets in."""
    server = serve({"max_clients": 4}, echo=echo)
    admission = server._admission
    admission._limits = replace(admission._limits, handshake_timeout_s=0.3)
    before = set(os.listdir("/dev/shm"))
    answers = []
    for _ in range(20):
        one = stranger()
        one.send(HELLO)
        answers.append(one.receive())
    assert sum(isinstance(answer, Refused) for answer in answers) >= 16
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("shmtransport-")} == set()
    time.sleep(0.35)
    with Client(address) as client:
        assert client.call("echo", 1) == 1


def test_an_unfinished_hello_does_not_count_against_the_total_for_ever(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """What a stranger reserved and never used is given back."""
    server = serve({"max_total_arena_bytes": 4 * MIB}, echo=echo)
    admission = server._admission
    admission._limits = replace(admission._limits, handshake_timeout_s=0.3)
    one = stranger()
    one.send(hello(2 * MIB))
    assert isinstance(one.receive(), Offer)
    with pytest.raises(ConnectRefused, match="max_total_arena_bytes"):
        Client(address, arena_bytes=MIB)
    time.sleep(0.35)
    with Client(address, arena_bytes=2 * MIB) as client:
        assert client.call("echo", 1) == 1


def test_a_client_that_says_goodbye_in_mid_handshake_is_forgotten_at_once(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """Its share is free without waiting for a time-out."""
    serve({"max_clients": 1}, echo=echo)
    one = stranger()
    one.send(HELLO)
    assert isinstance(one.receive(), Offer)
    one.send(Goodbye("changed my mind"))
    one.send(HELLO)
    assert isinstance(one.receive(), Offer)
    one.send(Goodbye("again"))
    with Client(address) as client:
        assert client.call("echo", 1) == 1


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
    for one in list(server._clients.values()):
        server._drop(one, "crashed")
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
