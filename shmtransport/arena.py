"""Segment + ring + tensor views: the two ends of one direction.

The *send arena* is this process's own segment: it claims blocks, hands them out as loans, and holds each block that
a descriptor names until the peer has released it. The *receive arena* is the peer's segment: it makes borrowed views
and releases them.

Rules that they keep:

* allocator state is private memory; of what the peer can write, only release cells are read, and a cell counts only
  if it equals the sequence that this side gave out for that slot;
* a loan or borrow ends when the last tensor over its storage dies: the weak reference hangs on the memoryview that the
  *storage* owns, so slices, views, reshapes and numpy views of it keep it alive;
* what runs when a storage dies may run inside any garbage collection on any thread: it takes no lock. A loan's end is
  one ``deque.append``; a borrow's end is one fence, one plain store and one ``dict.pop``.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .descriptor import MAX_DIMENSIONS, TensorDescriptor, representable
from .dtypes import BY_NAME, BY_TORCH, DType
from .errors import ArenaFull, LocalProtocolError, PeerProtocolError, TensorTooLarge
from .layout import PAGE_BYTES
from .ring import Block, Ring
from .segment import Segment
from .units import size_text

if TYPE_CHECKING:
    from .statistics import Counters

    _Reference = weakref.ref[memoryview]
else:
    _Reference = weakref.ref


def release_fence() -> None:
    """Order all that this thread did before ahead of its next store.

    Python has no fence of its own. A lock's release followed by an acquire is one on every machine that CPython runs
    on, Arm included; a fresh lock is never contended, so this can't block even inside a garbage collection.
    """
    lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()


class _LoanAnchor(_Reference):
    """Weak reference to a loan's memory; its death is what ends the loan."""

    __slots__ = ("held",)
    held: _HeldBlock


class _BorrowAnchor(_Reference):
    """Weak reference to a borrow's memory; its death is what releases the borrow."""

    __slots__ = ("sequence", "slot")
    slot: int
    sequence: int


class _HeldBlock:
    """A claimed block: free again once its loan has ended and the peer has released every descriptor of it."""

    __slots__ = ("anchor", "block", "holds", "loaned")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.loaned = True
        self.holds = 0
        self.anchor: _LoanAnchor | None = None


def _tensor(memory: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose storage owns ``memory``; the bytes are reinterpreted, never converted."""
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _row(dtype: torch.dtype) -> DType:
    row = BY_TORCH.get(dtype)
    if row is None:
        raise LocalProtocolError(f"tensors of {dtype} can't be sent; known dtypes: {', '.join(map(str, BY_TORCH))}")
    return row


def _without_bytes(sizes: tuple[int, ...], row: DType) -> torch.Tensor:
    """A tensor without elements; the error for a shape that none can have."""
    if len(sizes) > MAX_DIMENSIONS:
        raise LocalProtocolError(f"a tensor of {len(sizes)} dimensions can't be sent; the limit is {MAX_DIMENSIONS}")
    if min(sizes, default=0) < 0 or not representable(sizes, row.itemsize):
        raise LocalProtocolError(f"no tensor can have the shape {sizes}")
    return torch.empty(sizes, dtype=row.torch)


class SendArena:
    """This process's own segment, seen as tensors to send.

    ``peer_released`` are the cells of the peer's release table (in the peer's segment). Safe for use by several
    threads.
    """

    def __init__(self, segment: Segment, peer_released: memoryview, counters: Counters) -> None:
        layout = segment.layout
        self._data = segment.view[layout.data_offset : layout.data_offset + layout.data_bytes]
        self._address: int = torch.frombuffer(self._data, dtype=torch.uint8).data_ptr()
        self._ring = Ring(layout.data_bytes)
        self._peer_released = peer_released
        self._counters = counters
        self._lock = threading.Lock()
        self._by_offset: dict[int, _HeldBlock] = {}
        # Ordered by age, with a first item that is found at once however many were taken out before it.
        self._held_by_peer: OrderedDict[int, tuple[int, _HeldBlock, float]] = OrderedDict()
        self._free_slots = list(range(len(peer_released) - 1, -1, -1))
        self._sequence = 0
        self._ended: deque[_LoanAnchor] = deque()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A loan: an uninitialised, contiguous CPU tensor of ``shape`` in this arena.

        Raises:
            TensorTooLarge: it exceeds the whole arena.
            ArenaFull: no gap is large enough now.
            LocalProtocolError: the dtype or shape can't be sent.
        """
        sizes = tuple(shape)
        row = _row(dtype)
        nbytes = math.prod(sizes) * row.itemsize
        if nbytes <= 0 or min(sizes, default=0) < 0 or len(sizes) > MAX_DIMENSIONS:
            return _without_bytes(sizes, row)
        with self._lock:
            return _tensor(self._loan(nbytes), dtype, sizes)

    def export(self, tensor: torch.Tensor) -> TensorDescriptor:
        """Describe a tensor to the peer and hold its block until the peer releases it.

        A contiguous tensor over one of this arena's loans is not copied; any other is copied in once.

        Raises:
            As ``empty``.
        """
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise LocalProtocolError("only dense tensors can be sent")
        row = _row(tensor.dtype)
        shape = tuple(tensor.shape)
        if tensor.device.type == "cpu" and tensor.is_contiguous() and len(shape) <= MAX_DIMENSIONS:
            offset = tensor.data_ptr() - self._address
            if 0 <= offset < self._ring.capacity and not tensor.is_conj() and not tensor.is_neg():
                with self._lock:
                    held = self._by_offset.get(tensor.untyped_storage().data_ptr() - self._address)
                    if held is not None:
                        return TensorDescriptor(offset, shape, row.name, *self._hold(held))
        if tensor.is_meta:
            raise LocalProtocolError("a meta tensor has no content and can't be sent")
        loan = self.empty(shape, tensor.dtype)
        if loan.numel() == 0:
            return TensorDescriptor(0, shape, row.name, 0, 0)
        loan.copy_(tensor.detach())
        return self._export_copy(loan)

    def export_array(self, array: np.ndarray[Any, Any]) -> TensorDescriptor:
        """As ``export``, for a numpy array of any strides and byte order, read-only or not."""
        row = BY_NAME.get(array.dtype.name)
        if row is None or isinstance(array, np.ma.MaskedArray):
            raise LocalProtocolError(f"a {type(array).__name__} of {array.dtype} can't be sent")
        if array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative:
            try:
                tensor = torch.from_numpy(array)
            except ValueError:  # strides that numpy allows in such arrays and torch doesn't
                pass
            else:
                return self.export(tensor)
        loan = self.empty(array.shape, row.torch)
        np.copyto(loan.numpy(), array)
        return self._export_copy(loan)

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """Take back descriptors that were never sent."""
        with self._lock:
            for descriptor in descriptors:
                if descriptor.sequence:
                    self._end_hold(descriptor.slot)

    def _export_copy(self, loan: torch.Tensor) -> TensorDescriptor:
        with self._lock:
            self._counters.bytes_copied += loan.nbytes
            self._counters.tensors_copied += 1
        return self.export(loan)

    def _hold(self, held: _HeldBlock) -> tuple[int, int]:
        """Hold a block for the peer; the slot and sequence that will release it."""
        if not self._free_slots:
            self._collect()
        if not self._free_slots:
            raise ArenaFull(
                f"{len(self._held_by_peer)} sent tensors are unreleased, as many as the release table has slots; "
                f"{self._peer_facts()}; release results"
            )
        slot = self._free_slots.pop()
        self._sequence += 1
        held.holds += 1
        self._held_by_peer[slot] = (self._sequence, held, time.monotonic())
        return slot, self._sequence

    def _loan(self, nbytes: int) -> memoryview:
        block = self._claim(nbytes)
        memory = self._data[block.offset : block.offset + nbytes]
        held = _HeldBlock(block)
        held.anchor = _LoanAnchor(memory, self._ended.append)
        held.anchor.held = held
        self._by_offset[block.offset] = held
        return memory

    def _claim(self, nbytes: int) -> Block:
        if nbytes > self._ring.capacity:
            raise TensorTooLarge(
                f"a tensor of {size_text(nbytes)} can't fit an arena of {size_text(self._ring.capacity)}: "
                f"raise arena_bytes to {nbytes + PAGE_BYTES} or more"
            )
        self._collect_oldest()
        block = self._ring.claim(nbytes)
        if block is None:
            self._collect()
            block = self._ring.claim(nbytes)
        if block is None:
            raise ArenaFull(
                f"requested {size_text(nbytes)}; arena is {size_text(self._ring.capacity)} with "
                f"{size_text(self._ring.largest_gap())} in its largest gap; {len(self._by_offset)} blocks held, "
                f"{self._peer_facts()}; drop tensors made by empty(), release results or raise arena_bytes"
            )
        return block

    def _peer_facts(self) -> str:
        if not self._held_by_peer:
            return "none of them by the peer"
        oldest = min(since for _, _, since in self._held_by_peer.values())
        return f"{len(self._held_by_peer)} borrows by the peer, oldest for {time.monotonic() - oldest:.1f} s"

    def _collect_oldest(self) -> None:
        """Free what has ended, looking at the oldest borrows only: O(1) in first-in-first-out use."""
        self._collect_ended_loans()
        while self._held_by_peer:
            slot = next(iter(self._held_by_peer))
            if self._peer_released[slot] != self._held_by_peer[slot][0]:
                break
            self._end_hold(slot)

    def _collect(self) -> None:
        """Free all that has ended."""
        self._collect_ended_loans()
        for slot, (sequence, _, _) in list(self._held_by_peer.items()):
            if self._peer_released[slot] == sequence:
                self._end_hold(slot)

    def _collect_ended_loans(self) -> None:
        while self._ended:
            held = self._ended.popleft().held
            held.loaned = False
            held.anchor = None
            self._free_if_unused(held)

    def _end_hold(self, slot: int) -> None:
        _, held, _ = self._held_by_peer.pop(slot)
        self._free_slots.append(slot)
        held.holds -= 1
        self._free_if_unused(held)

    def _free_if_unused(self, held: _HeldBlock) -> None:
        if not held.loaned and held.holds == 0:
            del self._by_offset[held.block.offset]
            self._ring.release(held.block)


class ReceiveArena:
    """The peer's segment, seen as tensors that it has sent.

    ``released`` are the cells of the release table in this process's own segment.
    """

    def __init__(self, segment: Segment, released: memoryview) -> None:
        layout = segment.layout
        self._data = segment.view[layout.data_offset : layout.data_offset + layout.data_bytes]
        self._released = released
        self._borrows: dict[int, _BorrowAnchor] = {}

    def __len__(self) -> int:
        """How many borrows are held."""
        return len(self._borrows)

    def borrow(self, descriptor: TensorDescriptor) -> torch.Tensor:
        """A view of the described tensor; released when the last tensor over its storage has died.

        Raises:
            PeerProtocolError: the descriptor is invalid.
        """
        row, nbytes = descriptor.validate(len(self._data), len(self._released))
        if nbytes == 0:
            return torch.empty(descriptor.shape, dtype=row.torch)
        if descriptor.sequence in self._borrows:
            raise PeerProtocolError(f"descriptor with sequence {descriptor.sequence} was sent before and is still held")
        memory = self._data[descriptor.offset : descriptor.offset + nbytes]
        anchor = _BorrowAnchor(memory, self._end)
        anchor.slot, anchor.sequence = descriptor.slot, descriptor.sequence
        self._borrows[descriptor.sequence] = anchor
        return _tensor(memory, row.torch, descriptor.shape)

    def _end(self, anchor: Any) -> None:
        release_fence()  # the reads of the block come before its release
        self._released[anchor.slot] = anchor.sequence
        self._borrows.pop(anchor.sequence, None)


def release_cells(segment: Segment) -> memoryview:
    """The release table of a segment as unsigned 64-bit cells, one aligned store each."""
    layout = segment.layout
    return segment.view[layout.release_offset : layout.release_offset + layout.release_bytes].cast("Q")
