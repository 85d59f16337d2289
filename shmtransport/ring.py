"""Claims and releases byte ranges of a data area: integers only, no memory, no I/O.

Rules that it keeps:

* claims are aligned and never overlap a held block or cross the end of the area;
* next-fit: a claim continues at the cursor, wraps at the end, and steps over blocks that are still held, so that
  one long-held block can't stall the rest; first-in-first-out use costs O(1) a claim;
* when nothing is held, the cursor returns to the start, so that light use stays on few, warm pages;
* positions only grow, so that a block's position names it for ever and a stale release is noticed.
"""

from __future__ import annotations

from .layout import BLOCK_ALIGNMENT, round_up


class Block:
    """A byte range: one that is held, or the gap between two that are. Blocks form a list ordered by offset.

    ``offset`` and ``nbytes`` (a multiple of the alignment) are in bytes. A held block's ``position`` is never given
    to another; a gap has none.
    """

    __slots__ = ("held", "nbytes", "next", "offset", "position", "previous")

    def __init__(self, position: int, offset: int, nbytes: int, *, held: bool = False) -> None:
        self.position = position
        self.offset = offset
        self.nbytes = nbytes
        self.held = held
        self.previous: Block | None = None
        self.next: Block | None = None

    def __repr__(self) -> str:
        return f"Block(position={self.position}, offset={self.offset}, nbytes={self.nbytes})"


_NO_POSITION = -1


class Ring:
    """A next-fit allocator over ``capacity`` bytes.

    Raises:
        ValueError: the capacity is no positive multiple of the alignment.
    """

    def __init__(self, capacity: int, alignment: int = BLOCK_ALIGNMENT) -> None:
        if capacity <= 0 or capacity % alignment:
            raise ValueError(f"capacity {capacity} is not a positive multiple of {alignment}")
        self.capacity = capacity
        self.alignment = alignment
        self.held_bytes = 0
        self._held_count = 0
        self._position = _NO_POSITION
        self._first = Block(_NO_POSITION, 0, capacity)
        self._cursor = self._first

    def __len__(self) -> int:
        """How many blocks are held."""
        return self._held_count

    def claim(self, nbytes: int) -> Block | None:
        """Claim ``nbytes`` bytes, or None if no gap is large enough now.

        Raises:
            ValueError: ``nbytes`` is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"a block needs at least one byte, not {nbytes}")
        needed = round_up(nbytes, self.alignment)
        gap = self._cursor
        while gap.held or gap.nbytes < needed:
            gap = gap.next or self._first
            if gap is self._cursor:
                return None
        # The first position beyond the last one given that falls on the gap's offset.
        position = self._position - self._position % self.capacity + gap.offset
        if position <= self._position:
            position += self.capacity
        block = Block(position, gap.offset, needed, held=True)
        before, behind = gap.previous, gap.next
        # From here on nothing is called, so that no interrupt comes between.
        self._position = position
        self._held_count += 1
        self.held_bytes += needed
        if gap.nbytes > needed:
            gap.offset += needed
            gap.nbytes -= needed
            behind = gap
        block.previous, block.next = before, behind
        if before is None:
            self._first = block
        else:
            before.next = block
        if behind is not None:
            behind.previous = block
        self._cursor = behind or self._first
        return block

    def release(self, block: Block) -> None:
        """Give a block back and join the gaps around it.

        Raises:
            ValueError: the block is not held (released before, or never claimed here).
        """
        if not block.held:
            raise ValueError(f"block at position {block.position} is not held")
        before, behind = block.previous, block.next
        gap = Block(_NO_POSITION, block.offset, block.nbytes) if behind is None or behind.held else behind
        joined = before is not None and not before.held
        # From here on nothing is called, so that no interrupt comes between.
        block.held = False
        self._held_count -= 1
        self.held_bytes -= block.nbytes
        if gap is behind:  # the usual case: the gap behind grows to the front
            gap.offset = block.offset
            gap.nbytes += block.nbytes
        else:
            gap.next = behind
            if behind is not None:
                behind.previous = gap
        if before is not None and joined:
            gap.offset = before.offset
            gap.nbytes += before.nbytes
        if self._cursor is block or (joined and self._cursor is before):
            self._cursor = gap
        if before is not None and joined:
            before = before.previous
        gap.previous = before
        if before is None:
            self._first = gap
        else:
            before.next = gap
        if self._held_count == 0:
            self._cursor = self._first

    def largest_gap(self) -> int:
        """Bytes in the largest gap; walks the list, for reports only."""
        largest = 0
        block: Block | None = self._first
        while block is not None:
            if not block.held:
                largest = max(largest, block.nbytes)
            block = block.next
        return largest
