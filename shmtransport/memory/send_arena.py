"""Lends tensors in this process's own segment, describes them to the peer, and holds them until the peer releases them.

Rules that it keeps:

* allocator state is private memory; of what the peer can write, only release cells are read, and a cell counts only
  if it equals the sequence that this side gave out for that slot;
* a loan ends when the last tensor over its storage dies: the weak reference hangs on what the *storage* owns, so
  slices, views, reshapes and numpy views of it keep it alive. What runs then may run inside any garbage collection on
  any thread: it takes no lock, and is one ``deque.append``;
* a signal handler or a finalizer may call in the middle of a call of the same thread. Such an *inner call* finds every
  structure whole: several steps of a change are made without calling anything in between, since CPython runs neither
  handlers nor finalizers there, and only after a look at whether an inner call was faster.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core import Block, NextFitAllocator
from ..core.layout import PAGE_BYTES
from ..errors import ArenaFull, TensorTooLarge, TransportError
from ..units import size_text
from .descriptor import MAX_DIMENSIONS, TensorDescriptor
from .dtypes import INTEGERS, AnyDType, DType
from .plain import address_of, check_content, refuse_copy, row_of, row_of_array, sizes_of, without_bytes
from .segment import Segment
from .views import Reference, view

FIRST_PAUSE_S, LONGEST_PAUSE_S = 50e-6, 5e-3  # between two looks for room: a release wakes no thread
_FEW_HELD = 8  # sent tensors: below this many, releases are collected only when a claim needs room
_BEYOND = 2**70  # bytes: beyond any arena, and beyond any number that an error can show

if TYPE_CHECKING:
    from ..statistics import Counters


class _Loan(Reference):
    """A claimed block, as a weak reference to the memory that was lent: the death of that memory ends the loan.

    The block is free again once the loan has ended and the peer has released every descriptor of it. ``lend`` sets the
    attributes as soon as it has made one: an ``__init__`` would cost every loan a call.
    """

    __slots__ = ("block", "ended", "holds")
    block: Block
    ended: bool
    holds: int


class _Copied:
    """A claimed block that a tensor was copied into: no local tensor refers to it; only the peer does."""

    __slots__ = ("block", "holds")
    ended = True
    block: Block

    def __init__(self) -> None:
        self.holds = 0


class SendArena:
    """This process's own segment, seen as tensors to send. Safe for use by several threads.

    Args:
        segment: this process's own.
        peer_released: the cells of the release table in the peer's segment.
        counters: where stalls are counted.
        claim_timeout_s: how long in seconds a claim without room waits for the peer to release something.
        check_peer: called again and again during such a wait; raises if the peer can't release anything any longer.
    """

    def __init__(
        self,
        segment: Segment,
        peer_released: memoryview,
        counters: Counters,
        claim_timeout_s: float = 0.0,
        check_peer: Callable[[], None] = lambda: None,
    ) -> None:
        layout = segment.layout
        self._data = segment.data
        self._address: int = torch.frombuffer(self._data, dtype=torch.uint8).data_ptr()
        self._allocator = NextFitAllocator(layout.data_bytes)
        self._peer_released = peer_released
        self._counters = counters
        self._claim_timeout_s = claim_timeout_s
        self._this_thread = threading.local()
        self._check_peer = check_peer
        self._lock = threading.RLock()  # a signal handler or a finalizer may claim in the middle of a claim
        self._by_address: dict[int, _Loan] = {}
        # Ordered by age. Not a dict, which takes the longer to find its first item the more were removed before it.
        self._held_by_peer: OrderedDict[int, tuple[int, _Loan | _Copied, float]] = OrderedDict()
        self._free_slots = list(range(len(peer_released) - 1, -1, -1))
        self._sequence = 0
        self._ended: deque[Any] = deque()
        self.copies: dict[int, int] = {}
        """Sizes in bytes of tensors that were copied in for messages that have not been sent yet, by sequence."""

    def lend(self, shape: int | Sequence[int], dtype: AnyDType) -> torch.Tensor:
        """Lend an uninitialised, contiguous CPU tensor of ``shape`` in this arena.

        Raises:
            TensorTooLarge: it exceeds the whole arena.
            ArenaFull: no gap is large enough, and waiting made none.
            LocalProtocolError: the dtype or shape can't be sent.
        """
        sizes = sizes_of(shape)
        row = row_of(dtype)
        nbytes = math.prod(sizes) * row.itemsize
        if not 0 < nbytes < _BEYOND or len(sizes) > MAX_DIMENSIONS or (sizes and min(sizes) < 0):
            return without_bytes(sizes, row)
        block: Block | None = None
        try:
            with self._lock:
                block = self._claim(nbytes)
            memory, tensor = view(self._data, block.offset, row, sizes)
            loan = _Loan(memory, self._ended.append)
            loan.block = block
            loan.ended = False
            loan.holds = 0
            self._by_address[self._address + block.offset] = loan
        except BaseException:
            self._take_back(block)
            raise
        return tensor

    @contextlib.contextmanager
    def claims_within(self, timeout_s: float) -> Iterator[None]:
        """Bound this thread's claims by ``timeout_s`` seconds in all, in place of the arena's time for each."""
        outer = vars(self._this_thread).get("deadline")
        self._this_thread.deadline = time.monotonic() + timeout_s
        try:
            yield
        finally:
            if outer is None:
                del self._this_thread.deadline
            else:
                self._this_thread.deadline = outer

    def export(self, tensor: torch.Tensor) -> TensorDescriptor:
        """Describe a tensor to the peer and hold its block until the peer releases it.

        A contiguous tensor over one of this arena's loans is not copied; any other is copied in once.

        Raises:
            As ``lend``.
        """
        # Only a CPU tensor has its storage at one of these addresses.
        loan = self._by_address.get(address_of(tensor))
        row = row_of(tensor.dtype)
        shape = tuple(tensor.shape)
        if (
            loan is not None
            and tensor.is_contiguous()
            and not (tensor.is_conj() or tensor.is_neg())
            and len(shape) <= MAX_DIMENSIONS
            and tensor.nbytes > 0
        ):
            return self._describe(loan, tensor.data_ptr() - self._address, shape, row)
        check_content(tensor, row)
        return self._export_copy(tensor.detach() if tensor.requires_grad else tensor, shape, row)

    def has_lent(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of this arena's loans, so that it needs no more room to be sent."""
        return address_of(tensor) in self._by_address and tensor.is_contiguous()

    def export_array(self, array: np.ndarray[Any, Any]) -> TensorDescriptor:
        """Describe a numpy array, of any strides and byte order, read-only or not; see ``export``."""
        row = row_of_array(array)
        if row.numpy is None:
            array = array.view(row.carrier.newbyteorder(array.dtype.byteorder))
        if array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative:
            try:
                tensor = torch.from_numpy(array)
            except ValueError:  # strides that numpy allows in such arrays and torch doesn't
                pass
            else:
                return self.export(tensor if row.numpy is not None else tensor.view(row.torch))
        return self._export_copy(array, array.shape, row)

    @property
    def held_by_peer(self) -> int:
        """How many sent tensors are not known to be released by the peer."""
        return len(self._held_by_peer)

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """Take back descriptors that were never sent."""
        with self._lock:
            for descriptor in descriptors:
                if descriptor.sequence:
                    self._end_hold(descriptor.slot, descriptor.sequence)
                    self.copies.pop(descriptor.sequence, None)

    def _export_copy(
        self, source: torch.Tensor | np.ndarray[Any, Any], shape: tuple[int, ...], row: DType
    ) -> TensorDescriptor:
        """Copy a tensor into a block that is free again once the peer has released it."""
        nbytes = math.prod(shape) * row.itemsize
        if nbytes == 0 or len(shape) > MAX_DIMENSIONS:
            without_bytes(shape, row)
            return TensorDescriptor(0, shape, row.name, 0, 0)
        copied = _Copied()
        block: Block | None = None
        try:
            with self._lock:
                copied.block = block = self._claim(nbytes)
            self._write(block.offset, source, shape, row)
            descriptor = self._describe(copied, block.offset, shape, row)
        except BaseException as error:
            self._take_back(block)
            if isinstance(error, Exception) and not isinstance(error, TransportError):
                refuse_copy(error)
            raise
        self.copies[descriptor.sequence] = nbytes
        return descriptor

    def _take_back(self, block: Block | None) -> None:
        """Undo a claim, if it was one and is not undone yet."""
        if block is not None and block.held:
            with self._lock:
                self._allocator.release(block)

    def _write(
        self, offset: int, source: torch.Tensor | np.ndarray[Any, Any], shape: tuple[int, ...], row: DType
    ) -> None:
        """Copy a tensor's content to this offset: by memcpy where possible, since torch would wake its threads."""
        if isinstance(source, torch.Tensor):
            if not (source.is_cpu and source.is_contiguous()) or source.is_conj() or source.is_neg():
                view(self._data, offset, row, shape)[1].copy_(source)
                return
            source = (source if row.numpy is not None else source.view(INTEGERS[row.itemsize])).numpy()
        np.copyto(np.ndarray(shape, row.carrier, self._data, offset), source)

    def _describe(self, loan: _Loan | _Copied, offset: int, shape: tuple[int, ...], row: DType) -> TensorDescriptor:
        """Describe what lies at an offset in a claimed block, and hold the block until the peer releases it."""
        held = self._held_by_peer
        descriptor: TensorDescriptor | None = None
        try:
            with self._lock:
                while True:
                    if len(held) >= _FEW_HELD or not self._free_slots:
                        self._collect_oldest()
                        if not self._free_slots:
                            self._wait_until(lambda: bool(self._free_slots), self._no_slot)
                    sequence, now, slot = self._sequence + 1, time.monotonic(), self._free_slots[-1]
                    descriptor = TensorDescriptor(offset, shape, row.name, slot, sequence)
                    if self._sequence + 1 == sequence and self._free_slots[-1] == slot:
                        break
                # From here on nothing is called, so that no interrupt comes between.
                del self._free_slots[-1]
                self._sequence = sequence
                loan.holds += 1
                held[slot] = (sequence, loan, now)
            return descriptor
        except BaseException:
            if descriptor is not None and held.get(descriptor.slot, (0,))[0] == descriptor.sequence:
                self.withdraw((descriptor,))
            raise

    def _claim(self, nbytes: int) -> Block:
        if self._ended:
            self._collect_ended_loans()
        if self._held_by_peer:
            self._collect_oldest()
        return self._allocator.claim(nbytes) or self._claim_slowly(nbytes)

    def _claim_slowly(self, nbytes: int) -> Block:
        """Wait until there is a gap that is large enough, and claim it."""
        if nbytes > self._allocator.capacity:
            raise TensorTooLarge(
                f"a tensor of {size_text(nbytes)} can't fit an arena of {size_text(self._allocator.capacity)}: "
                f"raise arena_bytes to {nbytes + PAGE_BYTES} or more"
            )
        block: Block | None = None
        while block is None:
            self._wait_until(lambda: self._allocator.has_room(nbytes), lambda: self._no_room(nbytes))
            block = self._allocator.claim(nbytes)
        return block

    def _wait_until(self, possible: Callable[[], bool], failure: Callable[[], ArenaFull]) -> None:
        """Collect what has ended until something is possible; gives the lock away while it waits.

        A release is a plain store by the peer, which wakes no one, so this looks again after ever longer pauses. It
        fails at once if the peer holds nothing: no release can come.

        Raises:
            ArenaFull: it did not become possible in time.
        """
        self._collect()
        started = time.monotonic()
        deadline: float = getattr(self._this_thread, "deadline", started + self._claim_timeout_s)
        pause_s = FIRST_PAUSE_S
        try:
            while not possible():
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._held_by_peer:
                    raise failure()
                if pause_s == FIRST_PAUSE_S:
                    self._counters.count_stall()
                self._lock.release()
                try:
                    self._check_peer()
                    time.sleep(min(pause_s, left_s))
                finally:
                    self._lock.acquire()
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self._collect()
        finally:
            if pause_s > FIRST_PAUSE_S:
                self._counters.count_stalled(time.monotonic() - started)

    def _no_slot(self) -> ArenaFull:
        return ArenaFull(
            f"{len(self._held_by_peer)} sent tensors are unreleased, as many as the release table has slots; "
            f"{self._peer_facts()}; release results"
        )

    def _no_room(self, nbytes: int) -> ArenaFull:
        return ArenaFull(
            f"requested {size_text(nbytes)}; arena is {size_text(self._allocator.capacity)} with "
            f"{size_text(self._allocator.largest_gap())} in its largest gap; {len(self._allocator)} blocks held, "
            f"{self._peer_facts()}; drop tensors made by empty(), release results or raise arena_bytes"
        )

    def _peer_facts(self) -> str:
        if not self._held_by_peer:
            return "none of them by the peer"
        oldest = min((since for _, (_, _, since) in self._held()), default=time.monotonic())
        return f"{len(self._held_by_peer)} borrows by the peer, oldest for {time.monotonic() - oldest:.1f} s"

    def _collect_oldest(self) -> None:
        """Free what has ended, but look only at the oldest borrows: O(1) in first-in-first-out use."""
        held, released = self._held_by_peer, self._peer_released
        with contextlib.suppress(StopIteration, KeyError, RuntimeError):  # none is left, or an inner call was faster
            while True:
                slot = next(iter(held))
                sequence = held[slot][0]
                if released[slot] != sequence:
                    return
                self._end_hold(slot, sequence)

    def _collect(self) -> None:
        """Free all that has ended."""
        self._collect_ended_loans()
        for slot, (sequence, _, _) in self._held():
            if self._peer_released[slot] == sequence:
                self._end_hold(slot, sequence)

    def _held(self) -> list[tuple[int, tuple[int, _Loan | _Copied, float]]]:
        """The slots in use, and which descriptor each stands for: its sequence, its block, and since when."""
        while True:
            with contextlib.suppress(RuntimeError):  # an inner call has changed them
                return list(self._held_by_peer.items())

    def _collect_ended_loans(self) -> None:
        with contextlib.suppress(IndexError):  # there is none left
            while True:
                loan: _Loan = self._ended.popleft()
                loan.ended = True
                if loan.holds == 0:
                    self._free(loan)

    def _end_hold(self, slot: int, sequence: int) -> None:
        """End a hold, unless an inner call has ended it."""
        ended = self._held_by_peer.get(slot)
        if ended is None or ended[0] != sequence:
            return
        del self._held_by_peer[slot]
        loan = ended[1]
        loan.holds -= 1
        self._free_slots.append(slot)
        if loan.ended and loan.holds == 0:
            self._free(loan)

    def _free(self, loan: _Loan | _Copied) -> None:
        block = loan.block
        if block.held:
            self._by_address.pop(self._address + block.offset, None)
            with contextlib.suppress(ValueError):  # an inner call was faster
                self._allocator.release(block)
