"""A server's listening socket, and a gate that lets libzmq accept one connection at a time.

libzmq aborts the process if it has no file descriptor for a connection that it accepts. So the server opens the
listening socket itself, hands it to libzmq, and then masks it in libzmq's epoll set. For each waiting connection, the
gate counts the descriptors that are left. If they suffice, it unmasks the socket for one event. If not, connections
wait in the kernel's queue, and everything else goes on.

libzmq has no interface for this: the gate finds the epoll set in /proc/self/fdinfo. If it can't, there is no gate.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from ..errors import AddressError, OutOfResources
from . import address as addresses
from . import open_files

logger = logging.getLogger("shmtransport")

_DIRECTORY = "/proc/self/fdinfo"
_REGISTRATION = re.compile(
    r"^tfd: *(\d+) events: *[0-9a-f]+ data: *([0-9a-f]+) +pos: *\d+ ino: *([0-9a-f]+)", re.MULTILINE
)
_EVENT = struct.Struct("=IQ" if os.uname().machine in ("x86_64", "i686") else "@IQ")  # packed on x86 alone
_EPOLL_CTL_MOD = 3
_BACKLOG = 100
_FIND_TIMEOUT_S = 1.0
_FIND_PAUSE_S = 0.002
_ACCEPT_PAUSE_S = 50e-6
_SHORT_PAUSE_S = 0.1

_libc = ctypes.CDLL(None, use_errno=True)


def listen(address: str) -> socket.socket:
    """Open a socket that listens at an address; a socket file has mode 0600 from the start.

    Raises:
        AddressError: the address can't be bound.
    """
    family, place = _family_and_place(address)
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            os.fchmod(listening.fileno(), 0o600)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise AddressError(f"can't bind {address}: {error.strerror}") from error
    listening.setblocking(False)
    return listening


def _family_and_place(address: str) -> tuple[socket.AddressFamily, Any]:
    if addresses.scheme_of(address) == "ipc":
        return socket.AF_UNIX, address[len(addresses.IPC) :]
    parts = urlsplit(address)
    try:
        family, _, _, _, place = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise AddressError(f"can't bind {address}: {error.strerror}") from error
    return family, place


class Gate:
    """Lets libzmq accept connections while enough file descriptors are left.

    Args:
        listening: the listening socket.
        zmq_fd: the duplicate of it that libzmq polls.

    Raises:
        OutOfResources: the gate's thread can't be started.
    """

    def __init__(self, listening: socket.socket, zmq_fd: int) -> None:
        self._show = _find_switch(zmq_fd)
        self._listening = listening
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        if self._show is None:
            logger.info(
                "libzmq's epoll set was not found: it accepts connections even if few file descriptors are left"
            )
            return
        self._show(0)
        thread = threading.Thread(target=self._run, name="shmtransport gate", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            os.close(self._wake_fd)
            raise OutOfResources(f"a server needs a thread to accept clients: {error}") from error
        self._thread = thread

    def close(self) -> None:
        """Stop letting connections in. A second call does nothing."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        os.close(self._wake_fd)

    def _run(self) -> None:
        arrivals = select.poll()
        arrivals.register(self._listening, select.POLLIN)
        arrivals.register(self._wake_fd, select.POLLIN)
        pause = select.poll()
        pause.register(self._wake_fd, select.POLLIN)
        told = False
        while True:
            if any(descriptor == self._wake_fd for descriptor, _ in arrivals.poll()) or self._stopping:
                return
            left = open_files.free()
            if left > open_files.reserve():
                self._let_one_in()
                time.sleep(_ACCEPT_PAUSE_S)  # libzmq's thread accepts; if it takes longer, the next round unmasks again
                told = False
                continue
            if not told:
                told = True
                logger.warning(
                    "no connection is accepted: %d file descriptors are left of %d, and %d are kept in reserve; raise "
                    "the limit (ulimit -n) or end connections",
                    *(left, open_files.limit(), open_files.reserve()),
                )
            if pause.poll(_SHORT_PAUSE_S * 1000):
                return

    def _let_one_in(self) -> None:
        if self._show is not None:
            self._show(select.EPOLLIN | select.EPOLLONESHOT)


def _find_switch(watched: int) -> Callable[[int], None] | None:
    """Return what sets the events that libzmq's epoll set watches a descriptor for, or None."""
    deadline = time.monotonic() + _FIND_TIMEOUT_S
    while time.monotonic() < deadline:  # libzmq's thread registers it asynchronously
        found = _find_registration(watched)
        if found is not None:
            return functools.partial(_show, *found, watched)
        time.sleep(_FIND_PAUSE_S)
    return None


def _show(epoll: int, data: int, watched: int, events: int) -> None:
    if _libc.epoll_ctl(epoll, _EPOLL_CTL_MOD, watched, _EVENT.pack(events, data)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _find_registration(watched: int) -> tuple[int, int] | None:
    """Find the epoll descriptor that watches a descriptor, and the data of its events."""
    inode = os.fstat(watched).st_ino
    try:
        numbers = os.listdir(_DIRECTORY)
    except OSError:
        return None
    for number in numbers:
        with contextlib.suppress(OSError), open(f"{_DIRECTORY}/{number}", encoding="ascii") as file:
            for found in _REGISTRATION.finditer(file.read()):
                if int(found[1]) == watched and int(found[3], 16) == inode:
                    return int(number), int(found[2], 16)
    return None
