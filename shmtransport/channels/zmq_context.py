"""This process's ZeroMQ context: one for all of its clients and servers, and nothing else.

Rules that it keeps:

* It is never terminated while one of its sockets is open, and closing a socket never waits: a socket may be closed in a
  garbage collection, where termination would never return.
* It holds every open socket, so the garbage collector never closes one: each channel closes its own.
* If no socket is open when the process exits, what closed sockets still have to send is sent first, within their linger
  period.
* A forked child makes its own context, and never touches its parent's.
"""

from __future__ import annotations

import atexit
import os
import threading

import zmq

from ..errors import OutOfResources
from . import open_files

_CONTEXT_DESCRIPTORS = 8  # six that libzmq keeps, and two that it opens briefly
_SOCKET_DESCRIPTORS = 2  # its mailbox, and one connection
_MAX_SOCKETS = 16_384

_lock = threading.RLock()  # a signal handler may connect as well
_context: zmq.Context[zmq.Socket[bytes]] | None = None
_open: dict[int, zmq.Socket[bytes]] = {}
_inherited: list[object] = []
"""The parent process's context and sockets: kept, since dropping them would close them."""


def descriptors_to_start() -> int:
    """Return how many descriptors the first socket opens besides its own; 0 once it has."""
    return _CONTEXT_DESCRIPTORS if _context is None else 0


def open_socket(kind: int) -> zmq.Socket[bytes]:
    """Open a socket of this process's context; ``close_socket`` closes it.

    Raises:
        OutOfResources: this process has too few file descriptors left, or can't start libzmq's threads.
    """
    context = _context or _make_context()
    open_files.require(_SOCKET_DESCRIPTORS, "a ZeroMQ socket")
    try:
        socket = context.socket(kind)
    except zmq.ZMQError as error:
        raise OutOfResources(f"ZeroMQ can't make a socket: {error.strerror}") from error
    _open[id(socket)] = socket
    return socket


def close_socket(socket: zmq.Socket[bytes], linger_ms: int) -> None:
    """Close a socket without waiting; libzmq sends what is queued for up to ``linger_ms``."""
    socket.close(linger_ms)
    _open.pop(id(socket), None)


def _make_context() -> zmq.Context[zmq.Socket[bytes]]:
    global _context
    with _lock:
        if _context is None:
            open_files.require(_CONTEXT_DESCRIPTORS + _SOCKET_DESCRIPTORS, "ZeroMQ")
            _require_threads()
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
            _context = context
        return _context


def _require_threads() -> None:
    """Check that two threads can be started: libzmq aborts the process if its own two can't be."""
    may_end = threading.Event()
    started = []
    try:
        for _ in range(2):
            thread = threading.Thread(target=may_end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise OutOfResources(f"ZeroMQ needs two threads, and they can't be started: {error}") from error
    finally:
        may_end.set()
        for thread in started:
            thread.join()


def _flush_at_exit() -> None:
    """Let closed sockets send what they have queued; with one open, ``term`` would never return."""
    if _context is not None and not _open:
        _context.term()


def _forget_parent() -> None:
    global _context, _lock
    _inherited.extend((_context, *_open.values()))
    _context = None
    _lock = threading.RLock()  # another thread of the parent may have held it
    _open.clear()


atexit.register(_flush_at_exit)
os.register_at_fork(after_in_child=_forget_parent)
