"""A bell wakes one process that waits for messages: a named POSIX semaphore.

The side that waits makes the bell; its peer opens it by name and posts. A client's bell has its name only until the
client is welcome. A server's keeps its name for as long as it has doorbell clients, since new ones come by it; when a
server was killed, the name says which process it was, and the lock on the semaphore's file is free (see
``named_object``).

A bell only says "look again": the side that waits also looks by itself now and then, so that a peer that takes posts
away or adds some costs time, never a message.
"""

from __future__ import annotations

import contextlib
import os
from types import TracebackType
from typing import NamedTuple

import posix_ipc

from ..errors import PeerProtocolError, SegmentError
from .named_object import NamedObjects
from .opening import opening_error, reason
from .owner_lock import FileLock

NAME_PREFIX = "/shmtransport-bell-"
BELLS = NamedObjects("bell", NAME_PREFIX, FileLock(), file_prefix="sem.")  # where glibc keeps semaphores


class Bell:
    """One semaphore; ``lock_fd`` holds its owner's lock, and is -1 for a peer's bell."""

    def __init__(self, name: str, semaphore: posix_ipc.Semaphore, lock_fd: int) -> None:
        self.name = name
        self._semaphore = semaphore
        self._lock_fd = lock_fd
        self._linked = True
        self._closed = False

    @classmethod
    def create(cls) -> Bell:
        """Make a new bell, without posts.

        Raises:
            SegmentError: the system has no semaphore to give.
        """
        return BELLS.create(cls._make)

    @classmethod
    def _make(cls, name: str) -> Bell | None:
        """A new bell of this name; None if it was removed between its making and its locking."""
        try:
            with contextlib.ExitStack() as undo:
                semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
                undo.callback(semaphore.close)
                lock_fd = os.open(BELLS.file(name), os.O_RDWR | os.O_CLOEXEC)
                undo.callback(os.close, lock_fd)
                if not BELLS.claim(lock_fd):
                    return None
                undo.pop_all()
                return cls(name, semaphore, lock_fd)
        except FileNotFoundError:
            return None
        except (OSError, posix_ipc.Error) as error:
            raise SegmentError(f"can't create a semaphore for the doorbell: {reason(error)}") from error

    @classmethod
    def open(cls, name: str) -> Bell:
        """Open a peer's bell.

        Raises:
            PeerProtocolError: the name is not a bell's, nothing is there, or it can't be a semaphore.
            SegmentError: this process may not open it, or has too many files open.
        """
        if not BELLS.is_name(name):
            raise PeerProtocolError("the peer gave a bell's name that this protocol never makes")
        try:
            if not os.stat(BELLS.file(name)).st_size:  # looking into it would end this process
                raise PeerProtocolError("the peer's bell is an empty file")
            return cls(name, posix_ipc.Semaphore(name), -1)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise opening_error("bell", error) from error

    def post(self) -> None:
        """Wake the owner, or keep it from falling asleep."""
        try:  # noqa: SIM105 - suppress() takes longer than the rest
            self._semaphore.release()
        except (OSError, posix_ipc.Error):  # it has as many posts as there can be: its owner is awake
            pass

    def wait(self, timeout_s: float | None) -> bool:
        """Take one post, for which this blocks up to ``timeout_s`` seconds; False without one, or on a signal."""
        try:
            self._semaphore.acquire(timeout_s)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        return True

    def take(self) -> bool:
        """Take one post without blocking; whether there was one."""
        return self.wait(0)

    def unlink(self) -> None:
        """Remove the name; both sides keep what they have opened. A second call does nothing."""
        if self._linked:
            self._linked = False
            BELLS.unlink(self.name)

    def remove_if_dead(self) -> None:
        """Remove the name that a killed owner has left."""
        BELLS.remove_if_dead(self.name)

    def close(self) -> None:
        """Give the semaphore back, and its name if this process made it. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._lock_fd >= 0:
            self.unlink()
            os.close(self._lock_fd)
            self._lock_fd = -1
        self._semaphore.close()

    def __enter__(self) -> Bell:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def abandon(self) -> None:
        """In a forked child: forget the parent's bell without touching it; the parent's lock ends with the parent."""
        self._closed = True
        self._linked = False
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class Bells(NamedTuple):
    """What wakes this side, and what wakes the peer."""

    own: Bell
    peer: Bell
