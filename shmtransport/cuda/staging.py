"""Pinned memory of this process to copy through, where an arena can't be pinned itself."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..errors import DeviceError
from ..units import MIB
from .driver import ask

_SMALLEST_BYTES = 1 << 16
_KEPT_BYTES = 256 * MIB
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE


class Staging:
    """Buffers of pinned memory, kept for the next copy.

    Args:
        current: Makes the GPU's context that of the thread, for a while.
    """

    def __init__(self, current: Callable[[], AbstractContextManager[None]]) -> None:
        self._current = current
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._free_bytes = 0
        self._closed = False
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> int | None:
        """Return the address of a buffer of this size; None if no more memory can be pinned."""
        size = _size_of(nbytes)
        with self._lock:
            if self._free[size]:
                self._free_bytes -= size
                return self._free[size].pop()
        try:
            return int(ask("cuMemHostAlloc", size, _PORTABLE))
        except DeviceError:
            return None

    def give_back(self, address: int, nbytes: int) -> None:
        """Take back a buffer that the GPU does not use any more."""
        size = _size_of(nbytes)
        with self._lock:
            if not self._closed and self._free_bytes + size <= _KEPT_BYTES:
                self._free[size].append(address)
                self._free_bytes += size
                return
        _free(address)

    def close(self) -> None:
        """Free all buffers that are not in use."""
        with self._lock:
            self._closed = True
            addresses = [address for free in self._free.values() for address in free]
            self._free.clear()
        with contextlib.suppress(DeviceError), self._current():
            for address in addresses:
                _free(address)


def _size_of(nbytes: int) -> int:
    """The size of the buffer for this many bytes: a power of two."""
    return max(_SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())


def _free(address: int) -> None:
    with contextlib.suppress(DeviceError):  # the context has failed, and its memory with it
        ask("cuMemFreeHost", address)
