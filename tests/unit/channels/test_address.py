"""Addresses: only ipc paths and loopback, checked before use; a living server is never displaced."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from shmtransport.channels.address import MAX_IPC_PATH_BYTES, check_bind, check_connect, describe, is_served, scheme_of
from shmtransport.errors import AddressError


def _ipc(path: Path) -> str:
    return f"ipc://{path}"


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    return listener


@pytest.mark.parametrize("address", ["ipc:///tmp/worker.ipc", "ipc:///a", "ipc:///tmp/a b.ipc"])
def test_an_absolute_path_is_ipc(address: str) -> None:
    """ipc:// with an absolute path gives the transport "ipc", on both sides."""
    assert scheme_of(address) == check_connect(address) == "ipc"


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:5555", "tcp://localhost:1", "tcp://[::1]:5555", "tcp://127.8.9.10:80", "tcp://LOCALHOST:9"],
)
def test_loopback_is_tcp(address: str) -> None:
    """Loopback addresses give the transport "tcp", on both sides."""
    assert scheme_of(address) == check_connect(address) == check_bind(address) == "tcp"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "worker.ipc",
        "/tmp/worker.ipc",
        "ipc://worker.ipc",
        "ipc:///tmp/a\0b",
        "ipc:///tmp/\udcff/worker.ipc",
        "ipc://",
        "ipc://@abstract",
        "ipc://*",
        "ipc:/tmp/a",
        "IPC:///tmp/a",
        "inproc://a",
        "pgm://127.0.0.1:5",
        "udp://127.0.0.1:5",
        "http://127.0.0.1:5",
    ],
)
def test_anything_else_is_refused(address: str) -> None:
    """Relative paths, abstract sockets and other transports are refused by all three checks."""
    for check in (scheme_of, check_connect, check_bind):
        with pytest.raises(AddressError):
            check(address)


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1", "tcp://:5555", "tcp://", "tcp://127.0.0.1:x", "tcp://127.0.0.1:65536", "tcp://[::1:5"],
)
def test_a_malformed_tcp_address_is_refused(address: str) -> None:
    """Host and a port of 16 bits are both needed."""
    with pytest.raises(AddressError):
        scheme_of(address)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://*:5555",
        "tcp://0.0.0.0:5555",
        "tcp://[::]:5555",
        "tcp://192.168.0.1:5555",
        "tcp://example.org:80",
        "tcp://eth0:5555",
        "tcp://eth0;127.0.0.1:5555",
        "tcp://localhost.example.org:80",
        "tcp://127.0.0.1.example.org:80",
        "tcp://[0:0:0:0:0:0:0:0]:5555",
        "tcp://[::ffff:0.0.0.0]:5555",
        "tcp://[fe80::1]:5555",
        "tcp://0:5555",
        "tcp://2130706433:5555",
        "tcp://127.1:5555",
        "tcp://127.0.0.1;0.0.0.0:5555",
        "tcp://127.0.0.1@0.0.0.0:5555",
        "tcp://localhost@example.org:80",
        "tcp://localhost.:80",
    ],
)
def test_only_loopback_is_bound_or_connected(address: str) -> None:
    """All interfaces, other machines, interface names and whatever might mean one of them are refused on both sides."""
    for check in (check_bind, check_connect):
        with pytest.raises(AddressError, match="loopback"):
            check(address)


def test_a_path_may_have_107_bytes() -> None:
    """107 bytes are the system's limit; one more is refused with both numbers."""
    assert scheme_of("ipc:///" + "a" * (MAX_IPC_PATH_BYTES - 1)) == "ipc"
    with pytest.raises(AddressError, match="108 bytes; the system's limit is 107"):
        scheme_of("ipc:///" + "a" * MAX_IPC_PATH_BYTES)


def test_the_limit_counts_bytes() -> None:
    """A path of 60 characters can have more than 107 bytes."""
    with pytest.raises(AddressError, match="121 bytes"):
        scheme_of("ipc:///" + "é" * 60)


def test_a_free_path_can_be_bound(directory: Path) -> None:
    """The check itself creates nothing."""
    assert check_bind(_ipc(directory / "a.ipc")) == "ipc"
    assert os.listdir(directory) == []


def test_a_missing_directory_is_named(directory: Path) -> None:
    """The error names the directory and the remedy."""
    with pytest.raises(AddressError, match=f"{directory}/none.*create it, mode 0700"):
        check_bind(_ipc(directory / "none" / "a.ipc"))


def test_a_file_in_place_of_the_directory_is_none(directory: Path) -> None:
    """The error is the same, and the file stays."""
    (directory / "file").write_text("precious")
    with pytest.raises(AddressError, match=f"{directory}/file .*does not exist"):
        check_bind(_ipc(directory / "file" / "a.ipc"))
    assert (directory / "file").read_text() == "precious"


def test_a_living_server_is_not_displaced(directory: Path) -> None:
    """Where a process listens, binding is refused and the socket stays."""
    path = directory / "a.ipc"
    with _listen(path):
        assert is_served(str(path))
        with pytest.raises(AddressError, match="already listening"):
            check_bind(_ipc(path))
        assert path.exists()


def test_a_dead_servers_socket_is_cleared_away(directory: Path) -> None:
    """A socket file without a listener is removed."""
    path = directory / "a.ipc"
    _listen(path).close()
    assert path.is_socket()
    assert not is_served(str(path))
    assert check_bind(_ipc(path)) == "ipc"
    assert not path.exists()


@pytest.mark.parametrize("what", ["file", "directory", "link to a socket", "dangling link"])
def test_what_is_no_socket_is_never_removed(directory: Path, what: str) -> None:
    """A file, a directory or a symbolic link at the path belongs to someone else: refused, and left alone."""
    path = directory / "a.ipc"
    if what == "file":
        path.write_text("precious")
    elif what == "directory":
        path.mkdir()
    else:
        if what == "link to a socket":
            _listen(directory / "real.ipc").close()
        path.symlink_to(directory / "real.ipc")
    before = sorted(os.listdir(directory))
    with pytest.raises(AddressError, match="no socket"):
        check_bind(_ipc(path))
    assert sorted(os.listdir(directory)) == before


def test_nothing_at_a_path_is_not_served(directory: Path) -> None:
    """A missing socket file means no server."""
    assert not is_served(str(directory / "a.ipc"))


def test_a_server_that_accepts_nobody_is_served_all_the_same(directory: Path) -> None:
    """When a stopped server's backlog is full, the probe doesn't wait for room in it."""
    path = directory / "a.ipc"
    found: list[bool] = []
    with _listen(path), contextlib.ExitStack() as clients:
        for _ in range(4):
            client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(path))
        probe = threading.Thread(target=lambda: found.append(is_served(str(path))), daemon=True)
        probe.start()
        probe.join(2.0)
        answer = list(found)
    probe.join(30.0)
    assert answer == [True]


def test_a_killed_servers_socket_is_replaced_and_a_stopped_ones_is_not(directory: Path) -> None:
    """A killed process leaves a silent socket; a stopped one will go on."""
    path = directory / "a.ipc"
    ready, say_ready = os.pipe()
    child = os.fork()
    if child == 0:
        listener = _listen(path)
        os.write(say_ready, b"x")
        signal.pause()
        listener.close()
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        os.kill(child, signal.SIGSTOP)
        with pytest.raises(AddressError, match="already listening"):
            check_bind(_ipc(path))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(say_ready)
    assert path.is_socket()
    assert check_bind(_ipc(path)) == "ipc"
    assert not path.exists()


def test_a_dead_servers_socket_that_cant_be_removed_is_an_address_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error gives the system's reason; for example, the directory is another user's."""
    path = directory / "a.ipc"
    _listen(path).close()

    def refuse(_path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(AddressError, match="can't be removed: Permission denied"):
            check_bind(_ipc(path))


@pytest.mark.parametrize(
    ("mode", "warned"),
    [(0o700, False), (0o755, False), (0o720, True), (0o702, True), (0o770, True), (0o777, True), (0o1777, False)],
)
def test_a_directory_that_others_can_write_is_warned_of(
    directory: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Any user with write access to the directory can replace the socket; a sticky one such as /tmp prevents that."""
    shared = directory / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with caplog.at_level(logging.WARNING, logger="shmtransport"):
        check_bind(_ipc(shared / "a.ipc"))
    assert ("writable by others" in caplog.text) == warned


# Descriptions of what is at an address


def test_what_is_at_a_path_is_told_apart(directory: Path) -> None:
    """No directory, no file, no socket, a dead server's socket, and one that a process listens at."""
    (directory / "file").touch()
    path = directory / "socket"
    assert describe(f"ipc://{directory}/none/socket") == f"there is no directory {directory}/none"
    assert describe(_ipc(path)) == f"there is no file {path}"
    assert describe(f"ipc://{directory}/file") == f"{directory}/file is no socket"
    assert describe(_ipc(directory)) == f"{directory} is no socket"
    with _listen(path) as listener, contextlib.ExitStack() as clients:
        assert describe(_ipc(path)) == "a process listens there and has not answered yet"
        for _ in range(3):  # its backlog is full now
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(path))
        assert describe(_ipc(path)) == "a process listens there and has not answered yet"
        listener.close()
        assert describe(_ipc(path)) == f"no process listens at the socket {path}: its server has ended"


def test_what_is_at_a_port_is_told_apart() -> None:
    """A port with a listening process, and one without."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        assert describe(address) == "no process listens at this port"
        listener.listen()
        assert describe(address) == "a process listens there and has not answered yet"


def test_a_symbolic_link_to_nothing_is_described(directory: Path) -> None:
    """The link exists but can't be connected to: the system's message tells why."""
    (directory / "link").symlink_to(directory / "none")
    assert describe(f"ipc://{directory}/link") == "it can't be connected to: No such file or directory"
