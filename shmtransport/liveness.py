"""Who is at the other end, and is it still alive: from the kernel, never from a time-out.

Whoever creates a segment holds a POSIX record lock on it. Such a lock belongs to a process (a forked child does not
inherit it) and the kernel drops it when the process ends, however it ends. ``F_GETLK`` on the same segment gives the
holder's process id, translated into the asker's namespace, and a pidfd on it becomes readable when it has ended. A
stopped process holds its lock and is alive.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct

from .errors import PeerProtocolError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_OWNER_BYTE = 1


def hold(fd: int) -> None:
    """Take the owner's lock on a segment that this process has just made."""
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _OWNER_BYTE)


def holder(fd: int) -> int | None:
    """The process id that holds the owner's lock; None if nobody but perhaps this process itself does.

    0 or a negative number: a process that this one can't see (another pid namespace).
    """
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, _OWNER_BYTE, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    return None if kind == fcntl.F_UNLCK else pid


class PeerWatch:
    """Watches the process that owns an attached segment.

    ``fileno()`` becomes readable when that process ends; it is None where the process can't be seen and where the
    peer is this very process.

    Raises:
        PeerProtocolError: the owner's lock is not held, so nobody could be watched.
    """

    def __init__(self, fd: int, claimed_pid: int) -> None:
        self._lock_fd = fd
        self._pidfd: int | None = None
        self.pid = claimed_pid
        self._in_process = claimed_pid == os.getpid()
        if self._in_process:
            return
        pid = holder(fd)
        if pid is None:
            raise PeerProtocolError("the peer does not hold the lock on its own segment, or died meanwhile")
        if pid > 0:
            self.pid = pid
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError as error:
                raise PeerProtocolError("the peer ended during the handshake") from error
            except OSError:
                self._pidfd = None  # no pidfd on this kernel: ``alive`` asks for the lock instead

    def fileno(self) -> int | None:
        return self._pidfd

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
