"""Waiting for words in memory, and waking those who wait: Linux's futexes, by system calls that Python does not offer.

Linux before 5.16, and a container that forbids ``futex_waitv``, can wait for one word only. There the last of several
is waited for, and the others are looked at every ``LOOK_S``.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import time

MOST_WORDS = 128
"""The kernel's limit for one wait."""
LOOK_S = 1e-3
"""How often to look at what can't be waited for."""

_WAIT, _WAKE, _PRIVATE = 0, 1, 128
_SIZE_32 = 2
_ALL = 2**31 - 1
_FUTEX = {"x86_64": 202, "ppc64le": 221}.get(platform.machine(), 98)
_FUTEX_WAITV = 449
_WAITER = struct.Struct("=QQII")  # value, address, flags, reserved
_LONGEST_S = 3600.0

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))

    @classmethod
    def of(cls, seconds: float) -> _Timespec:
        return cls(int(seconds), int(seconds % 1 * 1e9))


class Word:
    """A word that counts posts. One side adds to it, the other waits until it changes.

    Args:
        posts: where it is.
        is_private: whether that is in this process's own memory, not in a segment.
    """

    def __init__(self, posts: ctypes.c_uint32, *, is_private: bool) -> None:
        self._posts = posts
        self.address = ctypes.addressof(posts)
        self.flags = _PRIVATE if is_private else 0
        self.seen = 0
        """The count at which a wait blocks."""

    def post(self) -> None:
        """Count one, and wake all who wait, in this process and, if the word is in a segment, in others."""
        self._posts.value += 1
        _syscall(_FUTEX, ctypes.c_void_p(self.address), _WAKE | self.flags, _ALL, None, None, 0)

    def has_changed(self) -> bool:
        """Whether there was a post since posts were last taken."""
        return self._posts.value != self.seen

    def take(self) -> bool:
        """Whether there was a post since this was asked last."""
        posts = self._posts.value
        taken = posts != self.seen
        self.seen = posts
        return taken


class _Kernel:
    """What the kernel is known to offer."""

    has_waitv = True


def wait_any(words: list[Word], timeout_s: float) -> bool:
    """Block until one of up to ``MOST_WORDS`` words is posted, unless one was after its last ``take``, or time is up.

    A wake-up may be late, of a post that was taken before: look again.

    Returns:
        False if time is up, or a signal came.
    """
    timeout_s = min(max(timeout_s, 0.0), _LONGEST_S)
    if len(words) == 1:
        return _wait_one(words[0], timeout_s) == 0
    if _Kernel.has_waitv:
        outcome = _wait_several(words, timeout_s)
        if outcome not in (errno.ENOSYS, errno.EPERM):
            return outcome == 0
        _Kernel.has_waitv = False
    return _wait_and_look(words, timeout_s) == 0


def _wait_and_look(words: list[Word], timeout_s: float) -> int:
    """Wait for the last word, and look at the others now and then."""
    outcome = errno.ETIMEDOUT
    while timeout_s > 0 and outcome == errno.ETIMEDOUT:
        if any(word.has_changed() for word in words):
            return 0
        outcome = _wait_one(words[-1], min(timeout_s, LOOK_S))
        timeout_s -= LOOK_S
    return outcome


def _wait_one(word: Word, timeout_s: float) -> int:
    left, seen = ctypes.byref(_Timespec.of(timeout_s)), ctypes.c_uint32(word.seen)
    return _outcome(_syscall(_FUTEX, ctypes.c_void_p(word.address), _WAIT | word.flags, seen, left, None, 0))


def _wait_several(words: list[Word], timeout_s: float) -> int:
    waiters = b"".join(_WAITER.pack(word.seen, word.address, _SIZE_32 | word.flags, 0) for word in words)
    end = ctypes.byref(_Timespec.of(time.monotonic() + timeout_s))
    return _outcome(_syscall(_FUTEX_WAITV, waiters, len(words), 0, end, time.CLOCK_MONOTONIC))


def _outcome(result: int) -> int:
    """0 if a word was woken or has changed, else the error's number."""
    number = ctypes.get_errno()
    return 0 if result >= 0 or number == errno.EAGAIN else number
