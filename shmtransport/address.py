"""Addresses: what may be bound or connected to, and what is already there."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
from urllib.parse import urlsplit

from .errors import AddressError

logger = logging.getLogger("shmtransport")

MAX_IPC_PATH_BYTES = 107  # sun_path of struct sockaddr_un, less its terminating zero
IPC = "ipc://"


def kind(address: str) -> str:
    """The transport that an address really uses: "ipc" or "tcp".

    Raises:
        AddressError: anything else.
    """
    if not isinstance(address, str) or "\0" in address:
        raise AddressError(f"{address!r} is no address: one is a str, as ipc:///tmp/worker.ipc")
    if address.startswith(IPC):
        path = address[len(IPC) :]
        if not path.startswith("/"):
            raise AddressError(f"{address!r}: an ipc address needs an absolute path, as in ipc:///tmp/worker.ipc")
        if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
            raise AddressError(
                f"the socket path has {len(os.fsencode(path))} bytes; the system's limit is {MAX_IPC_PATH_BYTES}: "
                "choose a shorter directory"
            )
        return "ipc"
    if address.startswith("tcp://"):
        try:
            host, port = urlsplit(address).hostname, urlsplit(address).port
        except ValueError as error:
            raise AddressError(f"{address!r}: {error}") from error
        if not host or port is None:
            raise AddressError(f"{address!r}: a tcp address needs host and port, as in tcp://127.0.0.1:5555")
        return "tcp"
    raise AddressError(f"{address!r} is neither ipc:///absolute/path nor tcp://host:port")


def check_connect(address: str) -> str:
    """Check an address before connecting; its kind.

    Raises:
        AddressError: it is malformed, or not on this machine.
    """
    found = kind(address)
    if found == "tcp":
        _require_loopback(address)
    return found


def check_bind(address: str) -> str:
    """Check an address before binding and clear a dead server's socket file away; its kind.

    Raises:
        AddressError: malformed, not loopback, no such directory, or a living server is there.
    """
    found = kind(address)
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
    """Whether a process listens on the socket file."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.setblocking(False)  # a stopped server with a full backlog is a server, and must not stop this one
    try:
        probe.connect(path)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True
    else:
        return True
    finally:
        probe.close()


def _require_loopback(address: str) -> None:
    host = urlsplit(address).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise AddressError(f"{address!r} is not on the loopback interface; shared memory reaches this machine only")
