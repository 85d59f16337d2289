"""How masks, keys and terms lie in a store, and the pools that hand them out.

    offset   0  magic                 8 bytes
             8  fingerprint           32 bytes: of the model
            40  pool of the layers    capacity, leased: two uint64
            56  pool of the output matrix, the same
          4096  keys of the layers' pool, 32 bytes a block; keys of the other
           ...  for each matrix of both pools: its terms, int32 [capacity, m]; each array begins at a multiple of 4096

A file begins with its magic once it is complete.

Rules that it keeps: see ``masks``.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping

import numpy as np

from ..checkpoint.matrices import MatrixKey
from ..checkpoint.quantised import Widths

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

BLOCK_ROWS = 16
"""Masks that share a key, are leased together, and are lost together when a process is killed."""

MAGIC = b"lsmasks\x01"
_KEY_BYTES = 32
PAGE = 4096
HEAD = struct.Struct("<8s32s")
POOL = struct.Struct("<QQ")
_LEASED = struct.Struct("<Q")
POOL_HEADERS = (HEAD.size, HEAD.size + POOL.size)


class Layout:
    """Where everything is in a store.

    Args:
        widths: of each matrix.
        tokens: how many masks each matrix of the layers has.
        logits: how many the output matrix has.
    """

    def __init__(self, widths: Mapping[MatrixKey, Widths], tokens: int, logits: int) -> None:
        layers = [matrix for matrix in widths if matrix[0].per_layer]
        others = [matrix for matrix in widths if not matrix[0].per_layer]
        self.matrices = (layers, others)
        self._end = PAGE
        capacities = (tokens, logits)
        self.keys = tuple(self._place(one // BLOCK_ROWS * _KEY_BYTES) for one in capacities)
        self.terms = {
            matrix: self._place(4 * capacity * widths[matrix].output)
            for capacity, matrices in zip(capacities, self.matrices, strict=True)
            for matrix in matrices
        }
        self.nbytes = self._end

    def _place(self, nbytes: int) -> int:
        start = self._end
        self._end += -(-nbytes // PAGE) * PAGE
        return start


class Pool:
    """The masks of several matrices that the same rows go through.

    Args:
        buffer: of the store.
        header: where the pool's header is in it.
        keys: where its keys are.
        terms: where the terms of each matrix are.
        widths: of each matrix.
        synchronise: has what was written stay, whatever happens.
    """

    def __init__(
        self,
        buffer: mmap.mmap,
        header: int,
        keys: int,
        terms: Mapping[MatrixKey, int],
        widths: Mapping[MatrixKey, Widths],
        synchronise: Callable[[], None],
    ) -> None:
        self.capacity: int
        self.leased: int
        self.capacity, self.leased = POOL.unpack_from(buffer, header)
        self._header = header
        self._buffer = buffer
        self._synchronise = synchronise
        view = memoryview(buffer)
        blocks = self.capacity // BLOCK_ROWS
        self.keys = np.frombuffer(view, np.uint8, blocks * _KEY_BYTES, keys).reshape(blocks, _KEY_BYTES)
        self.terms = {
            matrix: np.frombuffer(view, np.int32, self.capacity * widths[matrix].output, start).reshape(
                self.capacity, -1
            )
            for matrix, start in terms.items()
        }
        self.next = dict.fromkeys(terms, self.leased)  # for each matrix, the first mask that was not handed out

    def lease(self, end: int) -> None:
        """Have the file tell that all masks before this one are used, whatever becomes of this process."""
        leased = min(-(-end // BLOCK_ROWS) * BLOCK_ROWS, self.capacity)
        _LEASED.pack_into(self._buffer, self._header + _LEASED.size, leased)
        self._synchronise()
        self.leased = leased

    def level(self) -> None:
        """Use up what some matrices have left of the blocks that others are done with."""
        end = max(self.next.values(), default=0)
        for matrix, first in self.next.items():
            self.next[matrix] = end
            self.terms[matrix][first:end] = 0
        self.wipe(end)

    def wipe(self, end: int) -> None:
        """Wipe the keys of all whole blocks before this mask; those without a key were wiped before."""
        done = first = end // BLOCK_ROWS
        while first and self.keys[first - 1].any():
            first -= 1
        if first < done:
            self._synchronise()  # the terms first: a key tells that there is something to wipe
            self.keys[first:done] = 0

    def wipe_leased(self) -> None:
        """Wipe what this or another process has leased; blocks without a key were wiped before."""
        first = self.leased // BLOCK_ROWS
        while first and self.keys[first - 1].any():
            first -= 1
        for terms in self.terms.values():
            terms[first * BLOCK_ROWS : self.leased] = 0
        self.wipe(self.leased)


def write_header(buffer: mmap.mmap, fingerprint: str, *capacities: int) -> None:
    """Begin an empty store, without the magic that a complete file begins with."""
    HEAD.pack_into(buffer, 0, b"", fingerprint.encode())
    for at, capacity in zip(POOL_HEADERS, capacities, strict=True):
        POOL.pack_into(buffer, at, capacity, 0)
