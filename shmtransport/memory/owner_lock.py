"""The lock by which the owner of a named object is known to live; the kernel drops it however the owner ends.

It is a POSIX record lock: it tells its holder's process id, and a forked child does not inherit it. But a process can't
see its own, and closing any descriptor of the object ends it; so ``claim`` alone is for an object of this very process.

It keeps removers and owners apart: a remover takes a lock that keeps claims out, and so can neither take an object from
a living owner nor be mistaken for an owner itself.
"""

from __future__ import annotations

import fcntl
import os
import struct

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


def claim(fd: int) -> bool:
    """Take the owner's lock on a new object, until this process ends; False if a remover was faster."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _CLAIM_BYTES)
    except (BlockingIOError, PermissionError):
        return False
    return True


def keep_claims_out(fd: int) -> bool:
    """Take a remover's lock, which lasts until ``fd`` is closed; False if there is an owner, or another remover."""
    remover = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _OWNER_BYTES, _CLAIM_BYTES - _OWNER_BYTES, 0)
    try:
        # Of this open file, not of the process: threads exclude each other.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, remover)
    except (BlockingIOError, PermissionError):
        return False
    return holder(fd) is None
