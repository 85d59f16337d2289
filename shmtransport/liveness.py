"""Who is at the other end, and is it still alive: from the kernel, never from a time-out.

Whoever creates a segment holds a POSIX record lock on it. Such a lock belongs to a process (a forked child does not
inherit it) and the kernel drops it when the process ends, however it ends. ``F_GETLK`` on the same segment gives the
holder's process id, translated into the asker's namespace, and a pidfd on it becomes readable when it has ended. A
stopped process holds its lock and is alive.

The lock covers two bytes. The first one says who owns the segment. Whoever sweeps dead processes' segments away locks
the second one, and so can neither take one from a living owner nor be mistaken for an owner itself.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct

from .errors import PeerProtocolError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_OWNER_BYTES = 1  # from the start of the segment
_CLAIM_BYTES = 2  # these and one more


_made_here: set[tuple[int, int]] = set()
"""Device and inode of segments that this process has made; its own locks are invisible to it."""


def claim_ownership(fd: int) -> bool:
    """Take the owner's lock on a segment that this process has just made; False if a sweeper was faster."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _CLAIM_BYTES)
    except (BlockingIOError, PermissionError):
        return False
    if os.fstat(fd).st_nlink == 0:
        return False
    _made_here.add(_identity(fd))
    return True


def keep_claims_out(fd: int) -> bool:
    """Take the sweeper's lock, which lasts until ``fd`` is closed; False if there is an owner, or another sweeper.

    Must not be asked of a segment of this process: closing any of its descriptors ends the owner's lock.
    """
    sweeper = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _OWNER_BYTES, _CLAIM_BYTES - _OWNER_BYTES, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, sweeper)  # of this open file, not of the process: threads exclude each other
    except (BlockingIOError, PermissionError):
        return False
    return True


def end_ownership(fd: int) -> None:
    """Forget a segment that is about to be closed; the lock goes with its file descriptor."""
    _made_here.discard(_identity(fd))


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def holder(fd: int) -> int | None:
    """The process id that holds the owner's lock; None if no other process does.

    0 or a negative number: a process that this one can't see (another pid namespace).
    """
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, _OWNER_BYTES, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    return None if kind == fcntl.F_UNLCK else pid


os.register_at_fork(after_in_child=_made_here.clear)  # the locks are the parent's


class PeerWatch:
    """Watches the process that owns an attached segment; ``pid`` is its id, 0 or less if it can't be seen from here.

    ``fileno()`` becomes readable when that process ends; it is None where the process can't be seen and where the
    peer is this very process.

    Raises:
        PeerProtocolError: the owner's lock is not held, so nobody could be watched.
    """

    def __init__(self, fd: int) -> None:
        self._lock_fd = fd
        self._pidfd: int | None = None
        pid = holder(fd)
        self._in_process = pid is None and _identity(fd) in _made_here
        if pid is None and not self._in_process:
            raise PeerProtocolError("the peer does not hold the lock on its own segment, or died meanwhile")
        self.pid = os.getpid() if pid is None else pid
        if pid is not None and pid > 0:
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError as error:
                raise PeerProtocolError("the peer ended during the handshake") from error
            except OSError:
                self._pidfd = None  # no pidfd on this kernel: ``alive`` asks for the lock instead

    def fileno(self) -> int | None:
        return self._pidfd

    @property
    def must_be_asked(self) -> bool:
        """Whether only ``alive`` tells of the peer's end: there is no file descriptor that would."""
        return self._pidfd is None and not self._in_process

    def alive(self) -> bool:
        """Whether the peer's process still runs; never blocks."""
        if self._in_process:
            return True
        if self._pidfd is None:
            return holder(self._lock_fd) is not None
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
