"""Memory order for plain stores that another process reads; Python has no fences of its own.

``order`` keeps loads before it ahead of stores and loads after it, and stores before it ahead of stores after it: for
"written, then published" and "seen published, then read". x86 keeps that order by itself. ``full_fence`` also keeps a
store before it ahead of a load after it, which no machine does by itself: for "announced that I wait, then looked
again".

On x86 a full fence is any locked instruction, as in a lock's acquire; on Arm it is a lock's release followed by an
acquire (a load-acquire is never moved ahead of an earlier store-release). The lock is new, so no other thread has it:
this can't block, even inside a garbage collection.
"""

from __future__ import annotations

import platform
import threading

_new_lock = threading.Lock
_ON_X86 = platform.machine() in ("x86_64", "AMD64")


def _by_locked_instruction() -> None:
    """Make all that this thread has done visible before anything that it does next."""
    _new_lock().acquire(False)


def _by_release_and_acquire() -> None:
    """Make all that this thread has done visible before anything that it does next."""
    lock = _new_lock()
    lock.acquire()
    lock.release()
    lock.acquire()


def _ordered_by_hardware() -> None:
    """Do nothing: on this machine every store is a release and every load an acquire."""


full_fence = _by_locked_instruction if _ON_X86 else _by_release_and_acquire
order = _ordered_by_hardware if _ON_X86 else full_fence
