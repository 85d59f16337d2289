"""A bell wakes one process that waits for messages: a named POSIX semaphore.

Whoever waits makes the bell; its peer opens it by name and rings. A client's bell is unlinked by the server as soon as
it has opened it. A server's keeps its name for as long as it has doorbell clients, since new ones come by it; for the
case that it can't unlink it (kill -9), the name carries the owner's process id, and the owner holds an advisory lock
on the semaphore's file, so that anyone can tell a dead owner's bell from a living one's, in another container too.

A bell only says "look again": whoever waits also looks by itself now and then, so that a peer that takes tokens away
or adds some costs time, never a message.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from types import TracebackType

import posix_ipc

from .errors import PeerProtocolError, SegmentError
from .opening import opening_error, reason

NAME_PREFIX = "/shmtransport-bell-"
_NAME = re.compile(rf"{NAME_PREFIX}[0-9]{{1,10}}-[0-9a-f]{{32}}")
_MAKING_ATTEMPTS = 10


def is_bell_name(name: str) -> bool:
    """Whether a peer's string has the form of a bell's name; anything else is never opened."""
    return _NAME.fullmatch(name) is not None


def owner_in_name(name: str) -> int:
    """The process id that a bell's name carries, as its owner saw it."""
    return int(name[len(NAME_PREFIX) :].split("-")[0])


def bell_file(name: str) -> str:
    """Where glibc keeps the semaphore of this name."""
    return f"/dev/shm/sem.{name[1:]}"


class Bell:
    """One semaphore; ``lock_fd`` is its owner's lock, -1 for a peer's bell."""

    def __init__(self, name: str, semaphore: posix_ipc.Semaphore, lock_fd: int) -> None:
        self.name = name
        self._semaphore = semaphore
        self._lock_fd = lock_fd
        self._linked = True
        self._closed = False

    @classmethod
    def create(cls) -> Bell:
        """Make a new bell that nobody rings yet.

        Raises:
            SegmentError: the system has no semaphore to give.
        """
        for _ in range(_MAKING_ATTEMPTS):
            name = f"{NAME_PREFIX}{os.getpid()}-{secrets.token_hex(16)}"
            try:
                semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
                lock_fd = _lock(bell_file(name))
            except (OSError, posix_ipc.Error) as error:
                with contextlib.suppress(posix_ipc.ExistentialError):
                    posix_ipc.unlink_semaphore(name)
                raise SegmentError(f"can't create a semaphore for the doorbell: {reason(error)}") from error
            if lock_fd >= 0:
                return cls(name, semaphore, lock_fd)
            semaphore.close()  # swept away between its making and its locking
        raise SegmentError("every semaphore made for the doorbell was removed at once: does something sweep /dev/shm?")

    @classmethod
    def open(cls, name: str) -> Bell:
        """Open a peer's bell.

        Raises:
            PeerProtocolError: the name is none of ours, or nothing is there.
            SegmentError: this process may not open it, or has too many files open.
        """
        if not is_bell_name(name):
            raise PeerProtocolError("the peer gave a bell's name that this protocol never makes")
        try:
            return cls(name, posix_ipc.Semaphore(name), -1)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise opening_error("bell", error) from error

    def ring(self) -> None:
        """Wake the owner, or keep it from falling asleep."""
        try:  # noqa: SIM105 - suppress() takes longer than the rest
            self._semaphore.release()
        except (OSError, posix_ipc.Error):  # as many tokens as there can be: it is awake
            pass

    def wait(self, timeout_s: float | None) -> bool:
        """Block until the bell rings, up to ``timeout_s`` seconds; whether it rang. A signal ends the wait as well."""
        try:
            self._semaphore.acquire(timeout_s)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        return True

    def take(self) -> bool:
        """Take one ring back without blocking; whether there was one."""
        return self.wait(0)

    def unlink(self) -> None:
        """Remove the name; both sides keep what they have opened. A second call does nothing."""
        if self._linked:
            self._linked = False
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_semaphore(self.name)

    def remove_if_dead(self) -> None:
        """Remove the name that a killed owner has left."""
        remove_if_dead(bell_file(self.name))

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
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _lock(path: str) -> int:
    """Hold the owner's lock on a new bell's file; -1 if the file was swept away before that."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    fcntl.flock(fd, fcntl.LOCK_EX)  # waits for a sweeper that is just looking at it
    if os.fstat(fd).st_nlink == 0:
        os.close(fd)
        return -1
    return fd


def is_owned(path: str) -> bool:
    """Whether a living process owns the bell of this file.

    Raises:
        OSError: nothing is there any more, or it is another user's.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for this moment; who makes a bell waits so long
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def remove_if_dead(path: str) -> bool:
    """Remove a bell's file if no living process owns it; whether it was removed.

    The lock is held while the name is removed, so a bell that is just being made is either left alone or made anew.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or another user's
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT, errno.EPERM, errno.EACCES):
            raise
        return False
    finally:
        os.close(fd)
    return True
