"""Checks addresses before a bind or a connect, and describes what is at one."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import stat
from typing import Any
from urllib.parse import urlsplit

from ..errors import AddressError

logger = logging.getLogger("shmtransport")

MAX_IPC_PATH_BYTES = 107  # size of sockaddr_un.sun_path, without the terminating zero
IPC = "ipc://"
_LOOPBACK_S = 0.2
_LISTENING = "a process listens there and has not answered yet"


def scheme_of(address: str) -> str:
    """Return the scheme of an address: "ipc" or "tcp".

    Raises:
        AddressError: the address is malformed, or of another scheme.
    """
    if not isinstance(address, str) or "\0" in address:
        raise AddressError(f"{address!r} is no address: pass a str, for example ipc:///tmp/worker.ipc")
    if address.startswith(IPC):
        path = address[len(IPC) :]
        if not path.startswith("/"):
            raise AddressError(f"{address!r}: an ipc address needs an absolute path, for example ipc:///tmp/worker.ipc")
        try:
            nbytes = len(path.encode())
        except UnicodeEncodeError as error:
            raise AddressError(f"{address!r}: ZeroMQ takes paths in UTF-8 only: choose another directory") from error
        if nbytes > MAX_IPC_PATH_BYTES:
            raise AddressError(
                f"the socket path has {nbytes} bytes; the system's limit is {MAX_IPC_PATH_BYTES}: "
                "choose a shorter directory"
            )
        return "ipc"
    if address.startswith("tcp://"):
        try:
            host, port = urlsplit(address).hostname, urlsplit(address).port
        except ValueError as error:
            raise AddressError(f"{address!r}: {error}") from error
        if not host or port is None:
            raise AddressError(f"{address!r}: a tcp address needs host and port, for example tcp://127.0.0.1:5555")
        return "tcp"
    raise AddressError(f"{address!r} is neither ipc:///absolute/path nor tcp://host:port")


def check_connect(address: str) -> str:
    """Check an address before connecting, and return its scheme.

    Raises:
        AddressError: the address is malformed, or not on this machine.
    """
    found = scheme_of(address)
    if found == "tcp":
        _require_loopback(address)
    return found


def check_bind(address: str) -> str:
    """Check an address before binding, remove a dead server's socket, and return the scheme.

    Raises:
        AddressError: the address is malformed or not on loopback, its directory does not exist, or its path is taken by
            a living server, by a file that is no socket, or by a socket that can't be removed.
    """
    found = scheme_of(address)
    if found == "tcp":
        _require_loopback(address)
        return found
    path = address[len(IPC) :]
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise AddressError(f"the directory {directory} of the socket does not exist: create it, mode 0700")
    if os.stat(directory).st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not os.stat(directory).st_mode & stat.S_ISVTX:
        logger.warning(
            "directory %s is writable by others, who could replace the socket: use one of mode 0700", directory
        )
    if not os.path.lexists(path):
        return found
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise AddressError(f"{path} exists and is no socket: remove it or choose another address")
    if is_served(path):
        raise AddressError(f"another server is already listening at {address}: stop it or choose another address")
    try:
        os.unlink(path)
    except OSError as error:
        raise AddressError(f"the dead server's socket {path} can't be removed: {error.strerror}") from error
    return found


def is_served(path: str) -> bool:
    """Return whether a process listens at a socket file; True as well if it can't be probed."""
    return _probe(socket.AF_UNIX, path) not in (errno.ECONNREFUSED, errno.ENOENT)


def describe(address: str) -> str:
    """Describe what is at an address now, as a clause for a waiting client's log or error.

    Raises:
        AddressError: the address is malformed.
    """
    if scheme_of(address) == "tcp":
        found = urlsplit(address)
        family = socket.AF_INET6 if ":" in (found.hostname or "") else socket.AF_INET
        failed = _probe(family, (found.hostname, found.port))
        return "no process listens at this port" if failed == errno.ECONNREFUSED else _listens(failed)
    path = address[len(IPC) :]
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        return f"there is no directory {directory}"
    if not os.path.lexists(path):
        return f"there is no file {path}"
    failed = _probe(socket.AF_UNIX, path)
    if failed != errno.ECONNREFUSED:
        return _listens(failed)
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return f"{path} is no socket"
    return f"no process listens at the socket {path}: its server has ended"


def absence(address: str) -> str | None:
    """Return why no process listens at an address, as a clause; None if one does.

    Raises:
        AddressError: the address is malformed.
    """
    found = describe(address)
    return None if found == _LISTENING else found


def _probe(family: int, place: Any) -> int:
    """Connect to a socket and disconnect; return 0, or the number of the error."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # A stopped server whose backlog is full must not block this process. TCP on loopback answers at once.
        probe.settimeout(0.0 if family == socket.AF_UNIX else _LOOPBACK_S)
        return probe.connect_ex(place)


def _listens(failed: int) -> str:
    if failed in (0, errno.EAGAIN):
        return _LISTENING
    return f"it can't be connected to: {os.strerror(failed)}"


def _require_loopback(address: str) -> None:
    host = urlsplit(address).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise AddressError(f"{address!r} is not on the loopback interface; shared memory reaches this machine only")
