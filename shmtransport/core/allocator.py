"""Gives out the byte ranges of a data area and takes them back: integers only, no memory, no I/O.

Rules that it keeps:

* claims are aligned and never overlap a held block or cross the end of the area;
* next-fit: a claim continues at the cursor, wraps at the end, and steps over blocks that are still held, so that
  one long-held block can't stall the rest; first-in-first-out use costs O(1) a claim;
* when nothing is held, the cursor returns to the start, so that light use stays on few, warm pages;
* a signal handler or a finalizer may claim and release in the middle of a ``claim`` or ``release`` of the same thread.
  So each prepares everything first, then checks that nothing has changed, and then changes the list without calling
  anything: CPython runs neither handlers nor finalizers there.
"""

from __future__ import annotations

from .layout import BLOCK_ALIGNMENT, round_up
from .refusals import bad_capacity, block_not_held, empty_claim


class Block:
    """A byte range: one that is held, or a gap. Blocks form a list ordered by offset.

    ``offset`` and ``nbytes`` (a multiple of the alignment) are in bytes. They stay the same while the block is held;
    once it is released, it grows into the gap around it.
    """

    __slots__ = ("held", "nbytes", "next", "offset", "owner", "previous")

    def __init__(self, offset: int, nbytes: int, owner: object = None) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.owner = owner
        self.held = owner is not None
        self.previous: Block | None = None
        self.next: Block | None = None

    def __repr__(self) -> str:
        return f"Block(offset={self.offset}, nbytes={self.nbytes})"


class NextFitAllocator:
    """A next-fit allocator over ``capacity`` bytes.

    Raises:
        ValueError: the capacity is not a positive multiple of ``BLOCK_ALIGNMENT``.
    """

    def __init__(self, capacity: int) -> None:
        if capacity <= 0 or capacity % BLOCK_ALIGNMENT:
            raise bad_capacity(capacity)
        self.capacity = capacity
        self._mark = object()  # of this allocator's own blocks; no reference to it, which would be a cycle
        self._held_count = 0
        self._changes = 0
        self._first = Block(0, capacity)
        self._cursor = self._first

    def __len__(self) -> int:
        """How many blocks are held."""
        return self._held_count

    def claim(self, nbytes: int) -> Block | None:
        """Claim a block of at least ``nbytes`` bytes; None if no gap is large enough now. Keep it until it is released.

        Raises:
            ValueError: ``nbytes`` is not positive.
        """
        if nbytes <= 0:
            raise empty_claim(nbytes)
        needed = round_up(nbytes, BLOCK_ALIGNMENT)
        while True:
            changes = self._changes
            gap = self._find(needed)
            if gap is None:
                return None
            block = Block(gap.offset, needed, self._mark)
            if self._changes == changes:
                break
        # From here on nothing is called.
        self._changes = changes + 1
        self._held_count += 1
        before, after = gap.previous, gap.next
        if gap.nbytes > needed:
            gap.offset += needed
            gap.nbytes -= needed
            after = gap
        block.previous, block.next = before, after
        if before is None:
            self._first = block
        else:
            before.next = block
        if after is None:
            self._cursor = self._first
        else:
            after.previous = block
            self._cursor = after
        return block

    def release(self, block: Block) -> None:
        """Give a block back and join the gaps around it.

        Raises:
            ValueError: the block is not held (released before, or never claimed here).
        """
        if not block.held or block.owner is not self._mark:
            raise block_not_held(block.offset)
        # From here on nothing is called.
        self._changes += 1
        self._held_count -= 1
        block.held = False
        before, after, cursor = block.previous, block.next, self._cursor
        if after is not None and not after.held:
            block.nbytes += after.nbytes
            if cursor is after:
                self._cursor = block
            after = after.next
        if before is not None and not before.held:
            block.offset = before.offset
            block.nbytes += before.nbytes
            if cursor is before:
                self._cursor = block
            before = before.previous
        block.previous, block.next = before, after
        if after is not None:
            after.previous = block
        if before is None:
            self._first = block
        else:
            before.next = block
        if self._held_count == 0:
            self._cursor = self._first

    def has_room(self, nbytes: int) -> bool:
        """Whether ``claim`` would succeed now; walks the list as far as it would."""
        return self._find(round_up(nbytes, BLOCK_ALIGNMENT)) is not None

    def largest_gap(self) -> int:
        """Bytes in the largest gap; for reports, since it walks the whole list."""
        largest = 0
        block: Block | None = self._first
        while block is not None:
            if not block.held:
                largest = max(largest, block.nbytes)
            block = block.next
        return largest

    def _find(self, needed: int) -> Block | None:
        """The next gap from the cursor on that is large enough; starts again if an inner call changes the list."""
        while True:
            changes = self._changes
            gap = self._cursor
            while (gap.held or gap.nbytes < needed) and self._changes == changes:
                gap = gap.next or self._first
                if gap is self._cursor and self._changes == changes:
                    return None
            if self._changes == changes:
                return gap
