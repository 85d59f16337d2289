"""A timer for epoll: Linux's timerfd through ctypes, which ``os`` has from Python 3.13."""

from __future__ import annotations

import ctypes
import os
import struct
import time

_TIMES = struct.Struct("qqqq")  # struct itimerspec: interval and first expiry, each in seconds and nanoseconds

_libc = ctypes.CDLL(None, use_errno=True)


class Alarm:
    """A one-shot timer whose file descriptor becomes readable when it expires.

    Watched edge-triggered, it never needs to be read.

    Raises:
        OSError: too many files are open.
    """

    def __init__(self) -> None:
        self._fd = _checked(_libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        return self._fd

    def set(self, seconds: float) -> None:
        """Expire once, ``seconds`` from now, instead of at any time that was set before."""
        whole, part = divmod(seconds, 1)
        _checked(_libc.timerfd_settime(self._fd, 0, _TIMES.pack(0, 0, int(whole), int(part * 1e9)), None))

    def close(self) -> None:
        os.close(self._fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
