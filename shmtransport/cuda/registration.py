"""Pins a connection's arenas: registers their memory with CUDA, and takes that back before it is unmapped.

Rules that it keeps:

* it happens in a thread, so that a client is connected at once; until it is done, copies go through a buffer;
* it is done in pieces, since a driver may refuse one of many gigabytes; a copy never spans two pieces;
* memory is unmapped only after it was taken back, and taken back only behind the last copy;
* what can't be pinned is said once, with the cause and the remedy.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DeviceError
from ..units import GIB
from .driver import ask

if TYPE_CHECKING:
    from .gpu import Gpu

PINNED = "pinned"
PIECE_BYTES = 1 * GIB
"""The most to register at once."""
_PORTABLE, _READ_ONLY = 1, 8  # CU_MEMHOSTREGISTER_PORTABLE and _READ_ONLY


class Registration:
    """The pinned memory of one connection.

    Args:
        gpu: The GPU.
        memories: The data areas of the connection's segments.
    """

    def __init__(self, gpu: Gpu, memories: Sequence[memoryview]) -> None:
        self._gpu = gpu
        self._memories = list(memories)
        self._wanted = [piece for memory in memories for piece in _pieces(memory)]
        self._pinned: list[tuple[int, int]] = []
        """Start and end of each piece."""
        self._lock = threading.Lock()
        self._closed = False
        self.state = "the arenas are being pinned"
        """In words; ``PINNED`` once they are."""
        threading.Thread(target=self._register, name="shmtransport registration", daemon=True).start()

    def ranges(self, address: int, nbytes: int) -> list[tuple[int, int]] | None:
        """Cut a range at the borders of pieces: pairs of address and size; None if it is not all pinned."""
        if self.state != PINNED:
            return None
        found = []
        while nbytes:
            end = next((end for start, end in self._pinned if start <= address < end), None)
            if end is None:
                return None
            size = min(nbytes, end - address)
            found.append((address, size))
            address += size
            nbytes -= size
        return found

    def close(self) -> None:
        """Take the memory back; no copy may be under way any more."""
        with self._lock:
            self._closed = True
            if self._pinned:
                with contextlib.suppress(DeviceError), self._gpu.current():
                    self._unregister()
            self._memories.clear()

    def _register(self) -> None:
        """Runs in a thread of its own; the lock makes ``close`` wait for the piece that is being registered."""
        try:
            with self._gpu.current():
                for address, nbytes, flags in self._wanted:
                    with self._lock:
                        if self._closed:
                            return
                        ask("cuMemHostRegister", address, nbytes, flags)
                        self._pinned.append((address, address + nbytes))
        except DeviceError as error:
            self.state = f"not pinned: {error}"
            self._gpu.warn_of_bounces(error)
            with self._lock, contextlib.suppress(DeviceError), self._gpu.current():
                self._unregister()
        else:
            self.state = PINNED

    def _unregister(self) -> None:
        while self._pinned:
            ask("cuMemHostUnregister", self._pinned.pop()[0])


def _pieces(memory: memoryview) -> Iterator[tuple[int, int, int]]:
    """Address, size and flags of the pieces of one memory."""
    start = int(np.frombuffer(memory, np.uint8).ctypes.data)
    flags = _PORTABLE | _READ_ONLY if memory.readonly else _PORTABLE
    for offset in range(0, len(memory), PIECE_BYTES):
        yield start + offset, min(PIECE_BYTES, len(memory) - offset), flags
