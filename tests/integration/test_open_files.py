"""When file descriptors or threads run out, only the side that lacks them gets an error, with the figures."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import shmtransport.memory.ownership
from shmtransport import Client, ConnectRefused
from shmtransport.endpoints.connection_memory import ConnectionMemory, segment_layout
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import Attach, ChannelKind, Offer, Refused, Welcome
from tests.support.helpers import SERVER, Serve, Spawn, echo, eventually, start_client, start_server
from tests.support.process import ROOT, Process
from tests.support.strangers import HELLO, Stranger

pytestmark = pytest.mark.timeout(60)

LIMITED_CLIENT = ROOT / "tests/support/processes/limited_client.py"
SMALL = 4096
FLOOD = 1000
LACKING = r"needs \d+ file descriptors( and \d+ are kept in reserve)?; this process has \d+ left of {limit}"
REFUSED = (
    r"one more client needs \d+ file descriptors and \d+ are kept in reserve; this process has \d+ left of {limit}"
)


@pytest.fixture(autouse=True)
def _many_descriptors() -> Iterator[None]:
    """Raise this process's limit: the other process is the one with few descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def reserve_of(limit: int) -> int:
    return {64: 8, 256: 16, 1024: 16}[limit]


def connect_until_refused(address: str, channel: ChannelKind, limit: int) -> list[Client]:
    """Connect as many clients as the server takes, and check the reason that it gives the next one."""
    clients: list[Client] = []
    with pytest.raises(ConnectRefused, match=REFUSED.format(limit=limit)):  # noqa: PT012
        while True:
            clients.append(Client(address, channel=channel, arena_bytes=SMALL))
    return clients


# Servers


@pytest.mark.parametrize("limit", [20, 22, *range(23, 34), 48, 64])
def test_a_server_starts_or_says_what_is_missing(spawn: Spawn, address: str, limit: int) -> None:
    """OutOfResources with the figures, wherever the limit lies; one that has started takes clients, or says why not."""
    server = spawn(SERVER, address, json.dumps({"descriptors": limit}), ready=False)
    first = server.readline()
    if first == "ready":
        for client in connect_until_refused(address, "doorbell", limit):
            assert client.call("echo", 1) == 1
            client.close()
    else:
        assert re.search(rf"OutOfResources: .*{LACKING.format(limit=limit)}", server.output.read())
        assert server.wait() == 1


@pytest.mark.parametrize(
    ("channel", "limit"), [("zmq", 64), ("doorbell", 64), ("zmq", 256), ("doorbell", 256), ("doorbell", 1024)]
)
def test_clients_are_refused_before_descriptors_run_out(
    spawn: Spawn, address: str, channel: ChannelKind, limit: int
) -> None:
    """Those connected are served all the while, and when some have left, as many others are taken."""
    server = start_server(spawn, address, descriptors=limit, max_clients=1000)
    clients = connect_until_refused(address, channel, limit)
    assert len(clients) >= (limit - 48) // 8
    assert limit - descriptors(server) >= reserve_of(limit)
    for client in clients:
        assert client.call("echo", 1) == 1
    leaving = clients[: len(clients) // 2 + 1]
    del clients[: len(leaving)]
    for client in leaving:
        client.close()
    clients += connect_until_refused(address, channel, limit)
    assert len(clients) >= len(leaving)
    for client in clients:
        assert client.call("echo", 2) == 2
        client.close()


@pytest.mark.parametrize("limit", [64, 256])
def test_what_was_offered_to_one_client_is_not_offered_to_another(
    spawn: Spawn, address: str, stranger: Callable[[], Stranger], limit: int
) -> None:
    """However many begin the handshake before the first goes on: there are descriptors for all that got an Offer."""
    server = start_server(spawn, address, descriptors=limit)
    offered = []
    while True:
        one = stranger()
        one.send(HELLO)
        answer = one.receive()
        if not isinstance(answer, Offer):
            break
        offered.append(one)
    assert isinstance(answer, Refused)
    assert re.search(REFUSED.format(limit=limit), answer.reason)
    assert offered
    with contextlib.ExitStack() as undo:
        for one in offered:
            segment = Segment.create(segment_layout(SMALL))
            undo.callback(segment.close)
            one.send(Attach(segment.name))
            assert isinstance(one.receive(), Welcome)
        assert limit - descriptors(server) >= reserve_of(limit)
        server.signal(signal.SIGTERM)  # it removes the names that these clients have not
        assert server.wait() == 0


# A process that opens a server's socket again and again


def open_sockets(address: str, count: int, opened: list[socket.socket]) -> None:
    """Connect and say nothing, as often as the kernel's queue has room."""
    for _ in range(count):
        opened.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        with contextlib.suppress(BlockingIOError):
            opened[-1].connect(address.removeprefix("ipc://"))


def close_all(opened: list[socket.socket]) -> None:
    while opened:
        opened.pop().close()


def serves_a_new_client(address: str, channel: ChannelKind) -> None:
    with Client(address, channel=channel, arena_bytes=SMALL) as client:
        assert client.call("echo", 1) == 1


@pytest.mark.parametrize("limit", [64, 256, 1024])
@pytest.mark.parametrize("work_s", [0.0, 0.3], ids=["idle", "in a handler"])
def test_sockets_that_are_held_open_cost_nobody_else_anything(
    spawn: Spawn, address: str, channel: ChannelKind, limit: int, work_s: float
) -> None:
    """A thousand of them: the server keeps serving its clients, and takes new ones when the sockets are gone."""
    server = start_server(spawn, address, descriptors=limit)
    opened: list[socket.socket] = []
    with Client(address, channel=channel, arena_bytes=SMALL) as client:
        try:
            busy = client.submit("work", work_s)
            for _ in range(FLOOD // 50):
                open_sockets(address, 50, opened)
                if not work_s:
                    assert client.call("echo", 1) == 1
            busy.result()
            assert client.call("echo", 1) == 1
            assert descriptors(server) < limit
        finally:
            close_all(opened)
        assert client.call("echo", 2) == 2
        serves_a_new_client(address, channel)


@pytest.mark.parametrize("limit", [64, 256, 1024])
def test_sockets_that_come_and_go_cost_nobody_else_anything(
    spawn: Spawn, address: str, channel: ChannelKind, limit: int
) -> None:
    """Opened and closed as fast as can be, by two threads."""
    server = start_server(spawn, address, descriptors=limit)

    def come_and_go() -> None:
        opened: list[socket.socket] = []
        for _ in range(FLOOD // 10):
            open_sockets(address, 20, opened)
            close_all(opened)

    with Client(address, channel=channel, arena_bytes=SMALL) as client:
        threads = [threading.Thread(target=come_and_go) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert client.call("echo", 1) == 1
        assert descriptors(server) < limit
        serves_a_new_client(address, channel)


def test_the_log_tells_once_that_no_connection_is_accepted(spawn: Spawn, address: str) -> None:
    """With the figures and the remedy; one line, not one for each waiting connection."""
    server = start_server(spawn, address, descriptors=64)
    opened: list[socket.socket] = []
    open_sockets(address, 100, opened)
    line = server.readline()
    assert re.fullmatch(
        r"no connection is accepted: \d+ file descriptors are left of 64, and 8 are kept in reserve; .*ulimit -n.*",
        line,
    )
    time.sleep(0.5)  # several looks
    close_all(opened)
    serves_a_new_client(address, "zmq")
    server.signal(signal.SIGTERM)
    assert server.readline() == "stopped"


# Clients


@pytest.mark.parametrize(
    ("kind", "first", "channel"),
    [
        ("Client", 20, "zmq"),
        ("Client", 28, "doorbell"),
        ("Client", 36, "zmq"),
        ("AsyncClient", 20, "doorbell"),
        ("AsyncClient", 28, "zmq"),
        ("AsyncClient", 36, "doorbell"),
        ("in threads", 20, "zmq"),
        ("in threads", 28, "doorbell"),
        ("in threads", 36, "zmq"),
    ],
)
def test_a_client_near_its_limit_connects_or_says_what_it_lacks(
    spawn: Spawn, shared_server: str, channel: ChannelKind, kind: str, first: int
) -> None:
    """Whatever the limit is: never an OSError, a ZMQError, or libzmq's abort; those connected go on."""
    processes = {
        limit: spawn(LIMITED_CLIENT, shared_server, channel, kind, str(limit), ready=False)
        for limit in range(first, first + 8)
    }
    for limit, process in processes.items():
        said = process.output.read()
        assert process.wait() == 0, said
        if kind == "in threads":  # one may take what another has just counted
            assert re.fullmatch(r"(\d (OutOfResources|SegmentError): .*\n)+", said), said
        else:
            assert re.fullmatch(rf"\d OutOfResources: .*{LACKING.format(limit=limit)}.*ulimit -n.*\n", said), said


# What a server can't open or start for one client


def test_a_doorbell_client_is_refused_where_its_thread_cant_be_started(
    serve: Serve, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears the cause; clients before and after it are served, by doorbell too once threads can be started."""
    serve(echo=echo)
    start = threading.Thread.start

    def start_no_relay(thread: threading.Thread) -> None:
        if thread.name == "shmtransport zmq":
            raise RuntimeError("can't start new thread")
        start(thread)

    with Client(address, arena_bytes=SMALL) as before:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start_no_relay)
            for _ in range(3):
                with pytest.raises(ConnectRefused, match="needs a thread: can't start new thread"):
                    Client(address, channel="doorbell", arena_bytes=SMALL)
                assert before.call("echo", 1) == 1
                serves_a_new_client(address, "zmq")
        serves_a_new_client(address, "doorbell")
        assert before.call("echo", 2) == 2


def test_a_client_whose_process_cant_be_watched_is_refused(
    serve: Serve, address: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears why; the server keeps nothing of it and goes on."""
    serve({"max_clients": 2}, echo=echo)

    def fail(_fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Client(address, arena_bytes=SMALL) as before:
        with monkeypatch.context() as patched:
            patched.setattr(shmtransport.memory.owner_lock, "holder", fail)
            for _ in range(3):
                with pytest.raises(ConnectRefused, match="the client's process can't be watched: Too many open files"):
                    Client(address, channel=channel, arena_bytes=SMALL)
        assert before.call("echo", 1) == 1
        serves_a_new_client(address, channel)


def test_a_client_without_a_pidfd_is_asked_whether_it_lives(
    serve: Serve, spawn: Spawn, address: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pidfd can't be opened, the client is served all the same, and its end is noticed."""
    gone: list[int] = []

    def fail(_pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", fail)
    server = serve(echo=echo)
    server.on_disconnect(gone.append)
    client = start_client(spawn, address, channel, "idle", SMALL)
    client.signal(signal.SIGKILL)
    assert eventually(lambda: gone == [1])


def test_a_client_that_cant_be_served_after_all_is_refused(
    serve: Serve, address: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure after its segments are mapped is a refusal too, with the cause; it doesn't count as a client."""
    gone: list[int] = []
    server = serve({"prefault": True, "max_clients": 2}, echo=echo)
    server.on_disconnect(gone.append)

    def fail(_connection: ConnectionMemory) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with Client(address, arena_bytes=SMALL) as before:
        with monkeypatch.context() as patched:
            patched.setattr(ConnectionMemory, "prefault", fail)
            for _ in range(3):
                with pytest.raises(ConnectRefused, match="it can't serve one more client: Cannot allocate memory"):
                    Client(address, channel=channel, arena_bytes=SMALL)
        assert before.call("echo", 1) == 1
        assert gone == []
        serves_a_new_client(address, channel)
