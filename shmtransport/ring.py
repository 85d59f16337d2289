"""Claims and releases byte ranges of a data area: integers only, no memory, no I/O.

Rules that it keeps:

* claims are aligned and never overlap a held block or cross the end of the area;
* next-fit: a claim continues at the cursor, wraps at the end, and steps over blocks that are still held, so that
  one long-held block can't stall the rest; first-in-first-out use costs O(1) a claim;
* when nothing is held, the cursor returns to the start, so that light use stays on few, warm pages;
* positions only grow, so that a block's position names it for ever and a stale release is noticed.
"""

from __future__ import annotations

from typing import NamedTuple

from .layout import BLOCK_ALIGNMENT, round_up


class Block(NamedTuple):
    """A claimed byte range: ``offset``, ``nbytes`` (a multiple of the alignment); a ``position`` is never reused."""

    position: int
    offset: int
    nbytes: int


class _Span:
    """A node of the address-ordered list that covers the area: a held block or a gap between two."""

    __slots__ = ("held", "nbytes", "next", "offset", "previous")

    def __init__(self, offset: int, nbytes: int, held: bool) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.held = held
        self.previous: _Span | None = None
        self.next: _Span | None = None


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
        self._position = -1
        self._first = _Span(0, capacity, held=False)
        self._cursor = self._first
        self._held: dict[int, _Span] = {}

    def __len__(self) -> int:
        """How many blocks are held."""
        return len(self._held)

    def claim(self, nbytes: int) -> Block | None:
        """Claim ``nbytes`` bytes, or None if no gap is large enough now.

        Raises:
            ValueError: ``nbytes`` is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"a block needs at least one byte, not {nbytes}")
        needed = round_up(nbytes, self.alignment)
        span: _Span = self._cursor
        while span.held or span.nbytes < needed:
            following = span.next
            if following is None:
                following = self._first
            if following is self._cursor:
                return None
            span = following
        return self._take(span, needed)

    def release(self, block: Block) -> None:
        """Give a block back and join the gaps around it.

        Raises:
            ValueError: the block is not held (released before, or never claimed here).
        """
        span = self._held.pop(block.position, None)
        if span is None:
            raise ValueError(f"block at position {block.position} is not held")
        span.held = False
        self.held_bytes -= span.nbytes
        following = span.next
        if following is not None and not following.held:
            self._join(span, following)
        preceding = span.previous
        if preceding is not None and not preceding.held:
            self._join(preceding, span)
        if not self._held:
            self._cursor = self._first

    def largest_gap(self) -> int:
        """Bytes in the largest gap; walks the list, for reports only."""
        largest = 0
        span: _Span | None = self._first
        while span is not None:
            if not span.held:
                largest = max(largest, span.nbytes)
            span = span.next
        return largest

    def _take(self, gap: _Span, needed: int) -> Block:
        if gap.nbytes > needed:
            rest = _Span(gap.offset + needed, gap.nbytes - needed, held=False)
            rest.previous, rest.next = gap, gap.next
            if gap.next is not None:
                gap.next.previous = rest
            gap.next = rest
            gap.nbytes = needed
        gap.held = True
        self.held_bytes += needed
        self._cursor = gap.next or self._first
        self._position = self._next_position(gap.offset)
        self._held[self._position] = gap
        return Block(self._position, gap.offset, needed)

    def _next_position(self, offset: int) -> int:
        """The first position beyond the last one given that falls on ``offset``."""
        candidate = self._position - self._position % self.capacity + offset
        return candidate if candidate > self._position else candidate + self.capacity

    def _join(self, left: _Span, right: _Span) -> None:
        left.nbytes += right.nbytes
        left.next = right.next
        if right.next is not None:
            right.next.previous = left
        if self._cursor is right:
            self._cursor = left
