"""A server's listening socket: private from the start, with a gate that lets in one connection at a time."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmtransport import AddressError, Server
from shmtransport.channels import listener, open_files

GREETING_BYTES = 10  # what libzmq sends as soon as it has accepted a connection
NEVER_S = 0.4


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_a_socket_file_is_private_from_the_moment_that_it_exists(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask: no other user can connect, not even for a moment."""
    modes: list[int] = []

    class Watched(socket.socket):
        def bind(self, place: str) -> None:  # type: ignore[override]
            super().bind(place)
            modes.append(stat.S_IMODE(os.stat(place).st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    path = directory / "private.ipc"
    with listener.listen(f"ipc://{path}"):
        assert modes == [0o600]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("ipc://{directory}/nowhere/server.ipc", "No such file or directory"),
        ("ipc://{directory}/taken", "Address already in use"),
        ("ipc:///proc/server.ipc", "No such file or directory|Permission denied|Operation not"),
        ("tcp://no-such-host.invalid:1", "."),
        ("tcp://192.0.2.1:1", "Cannot assign requested address"),
    ],
)
def test_an_address_that_cant_be_bound_is_told_with_the_cause(directory: Path, place: str, why: str) -> None:
    """An AddressError gives the system's message, and nothing stays open."""
    (directory / "taken").touch()
    address = place.format(directory=directory)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AddressError, match=rf"can't bind {address}: ({why})"):
        listener.listen(address)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("[::1]", socket.AF_INET6)])
def test_a_tcp_address_is_listened_at(host: str, family: socket.AddressFamily) -> None:
    """The port is then taken; port 0 picks any free one."""
    if family == socket.AF_INET6 and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    with listener.listen(f"tcp://{host}:0") as listening:
        assert listening.family == family
        port = listening.getsockname()[1]
        with socket.create_connection((host.strip("[]"), port)):
            pass
        with pytest.raises(AddressError, match="Address already in use"):
            listener.listen(f"tcp://{host}:{port}")


# The gate


class Supply:
    """The number of checks that find enough descriptors."""

    def __init__(self) -> None:
        self.looks_allowed = 0

    def free(self) -> int:
        if self.looks_allowed > 0:
            self.looks_allowed -= 1
            return 1000
        return 0


@pytest.fixture
def supply(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> Supply:
    """Control how many free descriptors a running server finds."""
    serve()
    supply = Supply()
    monkeypatch.setattr(open_files, "free", supply.free)
    return supply


@pytest.fixture
def waiting(supply: Supply, address: str) -> Iterator[list[socket.socket]]:
    """Three connections that wait to be accepted."""
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for one in sockets:
        one.connect(address.removeprefix("ipc://"))
    yield sockets
    for one in sockets:
        one.close()


def greeted(sockets: list[socket.socket], timeout_s: float) -> list[socket.socket]:
    """The connections that the server greets, which it does as soon as it has accepted one."""
    found = []
    for one in sockets:
        one.settimeout(timeout_s)
        try:
            if len(one.recv(GREETING_BYTES)) == GREETING_BYTES:
                found.append(one)
        except TimeoutError:
            pass
    return found


def test_nothing_is_accepted_while_descriptors_are_short(waiting: list[socket.socket], supply: Supply) -> None:
    """Connections made in the meantime are accepted once there are enough."""
    assert greeted(waiting, NEVER_S) == []
    supply.looks_allowed = 1 << 30
    assert greeted(waiting, 10.0) == waiting


def test_one_connection_is_accepted_for_each_look(waiting: list[socket.socket], supply: Supply) -> None:
    """The gate counts what is left before each connection, since each one takes some."""
    for position in range(len(waiting)):
        supply.looks_allowed = 1
        assert greeted(waiting[position:], 1.0 if position == 0 else NEVER_S) == waiting[position : position + 1]
    assert supply.looks_allowed == 0


def test_a_server_closes_while_connections_wait(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate stops at any point; waiting connections are cut off."""
    server = Server(address)
    monkeypatch.setattr(open_files, "free", lambda: 0)
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(address.removeprefix("ipc://"))
        assert greeted([one], NEVER_S) == []
        server.close()
        with pytest.raises(ConnectionResetError):
            one.recv(GREETING_BYTES)


def test_without_proc_there_is_no_gate(
    serve: Callable[..., Server], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then libzmq accepts connections by itself, as if there were no gate."""
    monkeypatch.setattr(listener, "_DIRECTORY", "/nowhere/fdinfo")
    serve()
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(address.removeprefix("ipc://"))
        assert greeted([one], 10.0) == [one]
