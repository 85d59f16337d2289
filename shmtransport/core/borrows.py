"""What one side has borrowed of the peer's segment, and the releases that tell the peer when a borrow ends.

Rules that it keeps:

* a borrow ends when the last tensor over its storage dies: the weak reference hangs on what the *storage* owns, so
  slices, views, reshapes and numpy views of it keep it alive;
* what runs then may run inside any garbage collection on any thread: it takes no lock. It is one ``dict.pop``, one
  fence, and one plain store into this process's own segment;
* a slot is held by one borrow at a time: a descriptor that is sent again is refused while its borrow lives.
"""

from __future__ import annotations

import weakref
from typing import Any

from .fences import order
from .layout import RELEASE_CELL_BYTES
from .tensors import Tensors, extent_of


class _Anchor(weakref.ref[Any]):
    """A weak reference to a borrow's memory, whose death releases the borrow.

    ``borrow`` sets the attributes as soon as it has made one: an ``__init__`` would cost every borrow a call.
    """

    __slots__ = ("sequence", "slot")
    slot: int
    sequence: int


class Borrows:
    """The borrows of one connection.

    Args:
        data: the data area of the peer's segment.
        released: the cells of the release table in this side's own segment.
        tensors: how tensors are made.
    """

    def __init__(self, data: memoryview, released: memoryview, tensors: Tensors) -> None:
        self._data = data
        self._data_bytes = len(data)
        self._released = released
        self._rows, self._view = tensors.by_name, tensors.view
        self._held: dict[int, _Anchor] = {}

    def __len__(self) -> int:
        """How many borrows are held."""
        return len(self._held)

    def abandon(self) -> None:
        """In a forked child: what dies here is still borrowed in the parent, so it is not released."""
        self._released = memoryview(bytearray(len(self._released) * RELEASE_CELL_BYTES)).cast("Q")

    def borrow(self, offset: int, shape: tuple[int, ...], dtype: str, slot: int, sequence: int) -> Any:
        """Make a tensor of what a descriptor says; it is released when the last tensor over its storage has died.

        Returns:
            The tensor, or None: the descriptor is not valid, or is that of a tensor without elements.
        """
        row = self._rows.get(dtype)
        nbytes = 0 if row is None else extent_of(shape, row.itemsize)
        if (
            row is None
            or not nbytes
            or offset % row.itemsize
            or not 0 <= offset <= self._data_bytes - nbytes
            or not 0 <= slot < len(self._released)
            or sequence <= 0
            or slot in self._held
        ):
            return None
        memory, tensor = self._view(self._data, offset, row, shape)
        self._held[slot] = anchor = _Anchor(memory, self._end)
        anchor.slot = slot
        anchor.sequence = sequence
        return tensor

    def _end(self, anchor: Any) -> None:
        slot = anchor.slot
        self._held.pop(slot, None)  # first: once it is released, the peer may send another descriptor with this slot
        order()  # the reads of the block come before its release
        self._released[slot] = anchor.sequence
