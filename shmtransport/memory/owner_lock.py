"""Locks by which the owner of a named object is known to live; the kernel drops them however the owner ends.

There are two. ``RecordLock`` tells its holder's process id, but a process can't see its own, and closing any descriptor
of the object ends it. ``FileLock`` has neither flaw but tells no process id, so that has to stand in the object's name.
A forked child does not inherit a record lock; it does share a file lock until it closes the descriptor.

Both keep removers and owners apart: a remover takes a lock that keeps claims out, and so can neither take an object
from a living owner nor be mistaken for an owner itself.
"""

from __future__ import annotations

import fcntl
import os
import struct
from abc import ABC, abstractmethod

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_OWNER_BYTES = 1  # from the start of the object: this one is locked by its owner
_CLAIM_BYTES = 2  # these, and one more that is locked by a remover


def holder(fd: int) -> int | None:
    """The process that holds a record lock as an object's owner; None if no other process does.

    0 or a negative number: a process that this one can't see (another pid namespace).
    """
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, _OWNER_BYTES, 0)
    lock_type, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    return None if lock_type == fcntl.F_UNLCK else pid


class OwnerLock(ABC):
    """How an owner locks its objects. Every method takes an open descriptor of one."""

    tag_pattern = ""
    """A regular expression for ``tag``."""

    def tag(self) -> str:
        """What a new object's name must carry, so that ``owner`` can tell this process."""
        return ""

    @abstractmethod
    def claim(self, fd: int) -> bool:
        """Take the owner's lock on a new object; False if a remover was faster."""

    @abstractmethod
    def keep_claims_out(self, fd: int) -> bool:
        """Take a remover's lock, which lasts until ``fd`` is closed; False if there is an owner, or another remover."""

    @abstractmethod
    def owner(self, fd: int, name: str) -> int | None:
        """The owner's process id, 0 or negative if it can't be seen from here; None if there is no owner."""


class RecordLock(OwnerLock):
    """A POSIX record lock. ``keep_claims_out`` and ``owner`` are not for an object of this very process."""

    def claim(self, fd: int) -> bool:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _CLAIM_BYTES)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def keep_claims_out(self, fd: int) -> bool:
        remover = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _OWNER_BYTES, _CLAIM_BYTES - _OWNER_BYTES, 0)
        try:
            # Of this open file, not of the process: threads exclude each other.
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, remover)
        except (BlockingIOError, PermissionError):
            return False
        return holder(fd) is None

    def owner(self, fd: int, name: str) -> int | None:
        return holder(fd)


class FileLock(OwnerLock):
    """A lock by ``flock``; the owner's process id, as the owner saw it, is part of the name."""

    tag_pattern = "[0-9]{1,10}-"

    def tag(self) -> str:
        return f"{os.getpid()}-"

    def claim(self, fd: int) -> bool:
        fcntl.flock(fd, fcntl.LOCK_EX)  # waits for a process that is just looking at the object
        return True

    def keep_claims_out(self, fd: int) -> bool:
        return self._try(fd, fcntl.LOCK_EX)

    def owner(self, fd: int, name: str) -> int | None:
        return None if self._try(fd, fcntl.LOCK_SH) else int(name.rsplit("-", 2)[1])

    def _try(self, fd: int, operation: int) -> bool:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
