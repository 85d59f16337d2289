"""What one side has lent and sent of its own segment: claimed blocks, what refers to them, and their release slots.

Rules that it keeps:

* this state is private memory; of what the peer can write, only release cells are read, and a cell counts only if it
  equals the sequence that this side gave out for that slot;
* a loan ends when the last tensor over its storage dies: the weak reference hangs on what the *storage* owns, so
  slices, views, reshapes and numpy views of it keep it alive. What runs then may run inside any garbage collection on
  any thread: it takes no lock, and is one ``deque.append``;
* a signal handler or a finalizer may call in the middle of a call of the same thread. Such an *inner call* finds every
  structure whole: several steps of a change are made without calling anything in between, since CPython runs neither
  handlers nor finalizers there, and only after a look at whether an inner call was faster.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict, deque
from typing import Any

from .allocator import Block, NextFitAllocator
from .tensors import Tensors, address_of_memory, extent_of

FEW_HELD = 8
"""Sent tensors: below this many, releases are looked at only when a claim needs room."""


class _Loan(weakref.ref[Any]):
    """A claimed block, as a weak reference to the memory that was lent: the death of that memory ends the loan.

    The block is free again once the loan has ended and the peer has released every descriptor of it. ``lend`` sets the
    attributes as soon as it has made one: an ``__init__`` would cost every loan a call.
    """

    __slots__ = ("block", "ended", "holds")
    block: Block
    ended: bool
    holds: int


class Claim:
    """A block to copy into, until it is held or given back: no local tensor refers to it; only the peer does.

    ``offset`` is where it begins, in bytes from the start of the data area.
    """

    __slots__ = ("block", "holds", "offset")
    ended = True
    block: Block
    holds: int
    offset: int


class Loans:
    """The loans and holds of one connection. Safe for use by several threads.

    ``knows_tensors`` says whether ``export`` does anything.

    Args:
        data: the data area of this side's segment.
        released: the cells of the release table in the peer's segment.
        tensors: how tensors are made.
        address: where the data area begins. Default: found out.
    """

    knows_tensors = False

    def __init__(self, data: memoryview, released: memoryview, tensors: Tensors, address: int | None = None) -> None:
        self._data = data
        self._address = address_of_memory(data) if address is None else address
        self._allocator = NextFitAllocator(len(data))
        self._released = released
        self._rows, self._view, self._describe = tensors.by_dtype, tensors.view, tensors.describe
        self._lock = threading.RLock()  # a signal handler or a finalizer may claim in the middle of a claim
        self._by_address: dict[int, _Loan] = {}
        # Ordered by age. Not a dict, which takes the longer to find its first item the more were removed before it.
        self._held: OrderedDict[int, tuple[int, _Loan | Claim, float]] = OrderedDict()
        self._free_slots = list(range(len(released) - 1, -1, -1))
        self._sequence = 0
        self._ended: deque[Any] = deque()

    @property
    def capacity(self) -> int:
        """The size of the data area in bytes."""
        return self._allocator.capacity

    @property
    def blocks(self) -> int:
        """How many blocks are not free."""
        return len(self._allocator)

    @property
    def held_by_peer(self) -> int:
        """How many sent tensors are not known to be released by the peer."""
        return len(self._held)

    @property
    def has_slot(self) -> bool:
        """Whether a release slot is free."""
        return bool(self._free_slots)

    def lend(self, shape: Any, dtype: Any) -> Any:
        """Lend a tensor of a shape, a tuple, and a dtype.

        Returns:
            The tensor, or None: there is no room now, or it is for the caller to say what this would be.
        """
        row = self._rows.get(dtype)
        nbytes = 0 if row is None else extent_of(shape, row.itemsize)
        if row is None or not nbytes:
            return None
        block: Block | None = None
        try:
            with self._lock:
                block = self._claim(nbytes)
            if block is None:
                return None
            memory, tensor = self._view(self._data, block.offset, row, shape)
            loan = _Loan(memory, self._ended.append)
            loan.block = block
            loan.ended = False
            loan.holds = 0
            self._by_address[self._address + block.offset] = loan
        except BaseException:
            if block is not None:
                self._give_back(block)
            raise
        return tensor

    def export(self, tensor: Any, out: list[Any]) -> int | None:
        """Append a tensor's descriptor to ``out`` and hold it, if this twin knows tensors.

        The compiled twin returns how many bytes it has copied in, 0 for a tensor of a loan, and None for one that it
        leaves to the caller. This one leaves all to the caller, which is the specification of what can be sent.
        """
        return None

    def has(self, start: int) -> bool:
        """Whether a loan begins at an address."""
        return start in self._by_address

    def claim(self, nbytes: int) -> Claim | None:
        """Claim a block to copy into; None if there is no room now."""
        claim = Claim()
        claim.holds = 0
        block: Block | None = None
        try:
            with self._lock:
                block = self._claim(nbytes)
            if block is None:
                return None
            claim.block = block
            claim.offset = block.offset
        except BaseException:
            if block is not None:
                self._give_back(block)
            raise
        return claim

    def give_back(self, claim: Claim) -> None:
        """Undo a claim, unless it is held, or was undone already."""
        if claim.holds == 0:
            self._give_back(claim.block)

    def hold(self, what: int | Claim, offset: int, shape: tuple[int, ...], dtype: str, out: list[Any]) -> bool | None:
        """Append a descriptor to ``out``, and hold a block until the peer releases that.

        Args:
            what: the address at which a loan begins, or a claim that was copied into, and is used up.
            offset: where what is described begins, in bytes from the start of the data area.
            shape: its shape.
            dtype: the name of its dtype.
            out: gets the descriptor.

        Returns:
            Whether there was a free release slot; None if no loan begins at that address, or it is gone.
        """
        loan = what if isinstance(what, Claim) else self._by_address.get(what)
        if loan is None:
            return None
        held, count = self._held, len(out)
        descriptor = None
        try:
            with self._lock:
                while True:
                    if len(held) >= FEW_HELD or not self._free_slots:
                        self._collect_oldest()
                        if loan.ended and loan.holds == 0 and loan is not what:
                            return None  # that has freed it
                        if not self._free_slots:
                            return False
                    sequence, now, slot = self._sequence + 1, time.monotonic(), self._free_slots[-1]
                    descriptor = self._describe(offset, shape, dtype, slot, sequence)
                    if self._sequence + 1 == sequence and self._free_slots[-1] == slot:
                        break
                # From here on nothing is called but ``append``, so that no interrupt comes between.
                del self._free_slots[-1]
                self._sequence = sequence
                loan.holds += 1
                held[slot] = (sequence, loan, now)
                out.append(descriptor)
            return True
        except BaseException:
            if descriptor is not None and held.get(descriptor.slot, (0,))[0] == descriptor.sequence:
                del out[count:]
                self.end_hold(descriptor.slot, descriptor.sequence)
            raise

    def end_hold(self, slot: int, sequence: int) -> None:
        """End a hold, unless it has ended: its descriptor was never sent."""
        with self._lock:
            self._end_hold(slot, sequence)

    def collect(self) -> None:
        """Free all that has ended."""
        with self._lock:
            self._collect_ended()
            for slot, (sequence, _, _) in self._all_held():
                if self._released[slot] == sequence:
                    self._end_hold(slot, sequence)

    def has_room(self, nbytes: int) -> bool:
        """Whether a claim would find a gap now."""
        with self._lock:
            return self._allocator.has_room(nbytes)

    def largest_gap(self) -> int:
        """The size of the largest gap in bytes."""
        with self._lock:
            return self._allocator.largest_gap()

    def oldest_s(self) -> float:
        """For how long the peer has held what it has held longest, in seconds."""
        now = time.monotonic()
        return now - min((since for _, (_, _, since) in self._all_held()), default=now)

    def _give_back(self, block: Block) -> None:
        """Undo a claim, if it is not undone yet."""
        if block.held:
            with self._lock:
                self._allocator.release(block)

    def _claim(self, nbytes: int) -> Block | None:
        if self._ended:
            self._collect_ended()
        if self._held:
            self._collect_oldest()
        return self._allocator.claim(nbytes)

    def _collect_oldest(self) -> None:
        """Free what has ended, but look only at the oldest borrows: O(1) in first-in-first-out use."""
        held, released = self._held, self._released
        with contextlib.suppress(StopIteration, KeyError, RuntimeError):  # none is left, or an inner call was faster
            while True:
                slot = next(iter(held))
                sequence = held[slot][0]
                if released[slot] != sequence:
                    return
                self._end_hold(slot, sequence)

    def _all_held(self) -> list[tuple[int, tuple[int, _Loan | Claim, float]]]:
        """The slots in use, and which descriptor each stands for: its sequence, its block, and since when."""
        while True:
            with contextlib.suppress(RuntimeError):  # an inner call has changed them
                return list(self._held.items())

    def _collect_ended(self) -> None:
        with contextlib.suppress(IndexError):  # there is none left
            while True:
                loan: _Loan = self._ended.popleft()
                loan.ended = True
                if loan.holds == 0:
                    self._free(loan)

    def _end_hold(self, slot: int, sequence: int) -> None:
        """End a hold, unless an inner call has ended it."""
        ended = self._held.get(slot)
        if ended is None or ended[0] != sequence:
            return
        del self._held[slot]
        loan = ended[1]
        loan.holds -= 1
        self._free_slots.append(slot)
        if loan.ended and loan.holds == 0:
            self._free(loan)

    def _free(self, loan: _Loan | Claim) -> None:
        block = loan.block
        if block is not None and block.held:
            self._by_address.pop(self._address + block.offset, None)
            with contextlib.suppress(ValueError):  # an inner call was faster
                self._allocator.release(block)
