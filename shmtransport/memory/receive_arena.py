"""Borrows tensors that lie in the peer's segment, and tells the peer when they are released.

Rules that it keeps:

* a borrow ends when the last tensor over its storage dies: the weak reference hangs on what the *storage* owns, so
  slices, views, reshapes and numpy views of it keep it alive;
* what runs then may run inside any garbage collection on any thread: it takes no lock. It is one fence, one plain store
  into this process's own segment, and one ``dict.pop``.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core.fences import order
from ..core.layout import RELEASE_CELL_BYTES
from ..errors import PeerProtocolError
from .descriptor import TensorDescriptor
from .segment import Segment
from .views import Reference, view


class _BorrowAnchor(Reference):
    """A weak reference to a borrow's memory, whose death releases the borrow.

    ``borrow`` sets the attributes as soon as it has made one: an ``__init__`` would cost every borrow a call.
    """

    __slots__ = ("sequence", "slot")
    slot: int
    sequence: int


class ReceiveArena:
    """The peer's segment, seen as tensors that it has sent.

    ``released`` are the cells of the release table in this process's own segment.
    """

    def __init__(self, segment: Segment, released: memoryview) -> None:
        self._segment = segment
        self._data = segment.data
        self._data_bytes = len(self._data)
        self._released = released
        self._borrows: dict[int, _BorrowAnchor] = {}

    def __len__(self) -> int:
        """How many borrows are held."""
        return len(self._borrows)

    def abandon(self) -> None:
        """In a forked child: what dies here is still borrowed in the parent, so it is not released."""
        self._released = memoryview(bytearray(len(self._released) * RELEASE_CELL_BYTES)).cast("Q")

    def check_whole(self) -> None:
        """Check that what was read here so far was the peer's.

        Raises:
            PeerProtocolError: the peer has cut its segment short, and zeros were read in place of what it cut off.
        """
        if self._segment.was_cut:
            raise PeerProtocolError("the peer has cut its segment short")

    def borrow(self, descriptor: TensorDescriptor) -> torch.Tensor:
        """Make a view of the described tensor; it is released when the last tensor over its storage has died.

        Raises:
            PeerProtocolError: the descriptor is invalid.
        """
        row, nbytes = descriptor.validate(self._data_bytes, len(self._released))
        if nbytes == 0:
            return torch.empty(descriptor.shape, dtype=row.torch)
        sequence = descriptor.sequence
        if sequence in self._borrows:
            raise PeerProtocolError(f"descriptor with sequence {sequence} was sent before and is still held")
        memory, tensor = view(self._data, descriptor.offset, row, descriptor.shape)
        self._borrows[sequence] = anchor = _BorrowAnchor(memory, self._end)
        anchor.slot = descriptor.slot
        anchor.sequence = sequence
        return tensor

    def _end(self, anchor: Any) -> None:
        sequence = anchor.sequence
        order()  # the reads of the block come before its release
        self._released[anchor.slot] = sequence
        self._borrows.pop(sequence, None)


def release_cells(segment: Segment) -> memoryview:
    """The release table of a segment as unsigned 64-bit cells, one aligned store each."""
    layout = segment.layout
    return segment.view[layout.release_offset : layout.release_offset + layout.release_bytes].cast("Q")
