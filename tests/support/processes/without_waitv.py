"""A process that the kernel refuses ``futex_waitv``, as old ones do: ``without_waitv.py ENOSYS|EPERM``.

It waits for several rings, is posted in each way, and prints what it finds. Exit code 77: that can't be refused here.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import sys
import threading
import time
from collections.abc import Callable

from shmtransport.core import Bell
from tests.support.rings import RingPair

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_FILTER = 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_FUTEX_WAITV = 449
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def forbid(number: int, error: int) -> None:
    """Have the kernel answer a system call with this error from now on."""
    program = b"".join(
        struct.pack("=HBBI", *step)
        for step in (
            (_LOAD, 0, 0, 0),
            (_JUMP_IF_EQUAL, 0, 1, number),
            (_RETURN, 0, 0, _ERRNO | error),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    steps = ctypes.create_string_buffer(program)
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(steps))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 4
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, None, None, None) or prctl(_PR_SET_SECCOMP, _FILTER, described, None, None):
        print(f"prctl: errno {ctypes.get_errno()}")
        sys.exit(77)


forbid(_FUTEX_WAITV, getattr(errno, sys.argv[1]))
bell, pairs = Bell(), [RingPair(), RingPair()]
rings = tuple(pair.b for pair in pairs)


def posted_by(post: Callable[[], object]) -> bool:
    timer = threading.Timer(0.1, post)
    timer.start()
    posted = bool(bell.wait(rings, 20.0))
    timer.join()
    return posted


print("posted by a peer" if posted_by(pairs[0].a.end) else "missed a peer's post")
print("posted by itself" if posted_by(bell.post) else "missed its own post")
started = time.monotonic()
print("posted for nothing" if bell.wait(rings, 0.05) else "not posted")
print("in time" if time.monotonic() - started > 0.04 else "too early")
for pair in pairs:
    pair.close()
