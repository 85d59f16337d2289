"""Who is at the other end, and is it still alive: from the kernel, never from a time-out.

The owner of a segment holds a record lock on it. The kernel tells the lock's holder, translated into the asker's pid
namespace, and a pidfd on that process becomes readable when it has ended. A stopped process keeps its lock, so it is
alive.
"""

from __future__ import annotations

import os
import select

from ..errors import PeerProtocolError
from . import owner_lock
from .ownership import registry


class PeerWatch:
    """Watches the process that owns an attached segment; ``pid`` is its id, 0 or less if it can't be seen from here.

    Raises:
        PeerProtocolError: the owner's lock is not held, so there is no process to watch.
    """

    def __init__(self, fd: int) -> None:
        self._lock_fd = fd
        self._pidfd: int | None = None
        pid = owner_lock.holder(fd)
        self._in_process = pid is None and registry.owns_segment(fd)
        if pid is None and not self._in_process:
            raise PeerProtocolError("the peer does not hold the lock on its own segment, or has just died")
        self.pid = os.getpid() if pid is None else pid
        if pid is not None and pid > 0:
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError as error:
                raise PeerProtocolError("the peer ended during the handshake") from error
            except OSError:
                self._pidfd = None  # this kernel has none, or too many files are open: ``alive`` asks for the lock

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when the peer ends; None if it can't be seen, or is this very process."""
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
            return not self.has_left()
        return runs(self._pidfd)

    def has_left(self) -> bool:
        """Whether the peer no longer owns its segment: it has ended, or has closed the connection and lives on."""
        return not self._in_process and owner_lock.holder(self._lock_fd) is None

    def close(self) -> None:
        """Give the descriptor back. A second call does nothing."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def runs(pidfd: int) -> bool:
    """Whether the process of this descriptor still runs; never blocks."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)
