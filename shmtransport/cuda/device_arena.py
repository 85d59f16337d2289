"""Arenas on a GPU: tensors that never leave it. Only offset, shape and dtype of a tensor cross.

Rules that it keeps:

* the peer learns of a tensor when the GPU has completed it, and its block is free again when the GPU has passed the
  point at which the last view of it died. So neither side's streams ever wait for the other's, whatever it does;
* a descriptor's offset is counted from ``DEVICE_OFFSET`` on, which no segment reaches; the ranges of the two arenas of
  a connection have slots and sequences of their own, in cells within the segments' data areas.

What is lent and held is kept by the core's Python twin, as it is in ordinary memory: recording an event, as the end of
a block does here, costs more than that.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.borrows import Borrows
from ..core.loans import Claim, Loans
from ..core.tensors import Tensors
from ..errors import DeviceError, PeerProtocolError
from ..memory.descriptor import DEVICE_OFFSET, TensorDescriptor
from ..memory.dtypes import BY_NAME, BY_TORCH, DType
from .device_memory import DeviceMemory
from .driver import ask
from .fences import Fence
from .gpu import Gpu
from .tensors import DeviceTensors, Found

SLOTS = 1024
CELLS_BYTES = 8 * SLOTS


class Range:
    """A part of an arena, for as long as a tensor over it lives."""

    __slots__ = ("__weakref__", "handle", "keeper", "memory")

    def __init__(self, memory: DeviceMemory, offset: int) -> None:
        self.memory = memory
        self.handle = memory.address + offset
        self.keeper: object = None
        """What is to be told of its death."""


class Work:
    """What a program does on the GPU for one connection. It refers to no arena, which would be a cycle.

    Args:
        gpu: The GPU.
        tensors: How tensors on it are made and looked at.
        stream: The connection's.
    """

    def __init__(self, gpu: Gpu, tensors: DeviceTensors, stream: Any) -> None:
        self.gpu = gpu
        self.tensors = tensors
        self.stream = stream
        self.is_abandoned = False
        """Whether this is a forked child, where the GPU can't be used."""

    def view(self, data: Any, offset: int, row: DType, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Make a tensor over a part of an arena, and the part, which lives as long."""
        part = Range(data, offset)
        return part, self.tensors.over(part, shape, row, self.stream)

    def so_far(self, keep: Any = None) -> Fence:
        """Mark what the program has begun on its current stream."""
        return self.gpu.fence(self.tensors.current(self.stream), keep=keep)

    def behind(self, action: Callable[[], None]) -> None:
        """Do something once the GPU has done what it has been told so far; called where a tensor dies."""
        if self.is_abandoned:
            return
        try:
            with self.gpu.current():
                fence = self.so_far()
        except DeviceError:  # it has failed, and does nothing any more
            action()
        else:
            self.gpu.watcher.when_done(fence, action)


class _EndedBehindFences(deque[Any]):
    """Loans that have ended; one is added once the GPU has passed the point at which its last view died."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def append(self, loan: Any) -> None:
        self._work.behind(functools.partial(super().append, loan))


class _DeviceLoans(Loans):
    def __init__(self, data: Any, released: memoryview, tensors: Tensors, work: Work) -> None:
        super().__init__(data, released, tensors, address=data.address)
        self._ended = _EndedBehindFences(work)


class _DeviceBorrows(Borrows):
    def __init__(self, data: Any, released: memoryview, tensors: Tensors, work: Work) -> None:
        super().__init__(data, released, tensors)
        self._work = work

    def borrow(self, offset: int, shape: tuple[int, ...], dtype: str, slot: int, sequence: int) -> Any:
        tensor = super().borrow(offset, shape, dtype, slot, sequence)
        anchor = None if tensor is None else self._held.get(slot)
        if anchor is not None and (part := anchor()) is not None:
            part.keeper = self  # a result may outlive its client, and must still be released
        return tensor

    def _end(self, anchor: Any) -> None:
        self._work.behind(functools.partial(super()._end, anchor))


class Shared(NamedTuple):
    """What both sides of a connection have agreed on.

    Attributes:
        own: This side's memory.
        peers: The other side's.
        released: The cells in which the peer releases this side's tensors, in its segment.
        releases: The cells in which this side releases the peer's, in its own segment.
        peer_lives: Whether the peer's process does.
    """

    own: DeviceMemory
    peers: DeviceMemory
    released: memoryview
    releases: memoryview
    peer_lives: Callable[[], bool]


class DeviceArena:
    """Both arenas that one connection has on a GPU.

    Args:
        work: What the program does there.
        shared: The memory and the cells of both sides.
    """

    def __init__(self, work: Work, shared: Shared) -> None:
        self._work = work
        self._shared = shared
        made = Tensors(object, (), BY_TORCH, BY_NAME, work.view, _describe)
        self.loans: Loans = _DeviceLoans(shared.own, shared.released, made, work)
        self._borrows: Borrows = _DeviceBorrows(shared.peers, shared.releases, made, work)

    @property
    def borrowed(self) -> int:
        """How many tensors of the peer are borrowed."""
        return len(self._borrows)

    def is_over(self) -> bool:
        """Whether no tensor of this side is in use at the peer, now that the connection has ended."""
        self.loans.collect()
        return self.loans.held_by_peer == 0 or not self._shared.peer_lives()

    def abandon(self) -> None:
        """In a forked child: what dies here is still in use in the parent."""
        self._work.is_abandoned = True
        self._borrows.abandon()

    def lend(self, shape: tuple[int, ...], row: DType) -> Any:
        """Lend an uninitialised tensor; None if there is no room now, or it has no elements."""
        with self._work.gpu.current():
            return self.loans.lend(shape, row.torch)

    def export(self, found: Found, out: list[TensorDescriptor]) -> Fence | None:
        """Append the descriptor of a tensor on the GPU, which is copied unless it is a loan of this arena.

        Returns:
            The fence behind which the peer may learn of the tensor; None if there is no room or slot for it.

        Raises:
            DeviceError: The GPU has failed.
        """
        with self._work.gpu.current():
            if self.loans.has(found.start):
                made = self._work.so_far(keep=found.keep)  # first: nothing is held yet if this fails
                offset = found.pointer - self._shared.own.address
                if self.loans.hold(found.start, offset, found.shape, found.row.name, out):
                    return made
            return self._export_copy(found, out)

    def _export_copy(self, found: Found, out: list[TensorDescriptor]) -> Fence | None:
        claim = self._claim(found.nbytes)
        if claim is None:
            self.loans.collect()
            claim = self._claim(found.nbytes)
        if claim is None:
            return None
        address = self._shared.own.address + claim.offset
        try:
            work = self._work
            work.tensors.after_use(found, work.stream)
            ask("cuMemcpyDtoDAsync", address, found.pointer, found.nbytes, work.stream.handle)
            copy = work.gpu.fence(work.stream, keep=found.keep)
        except BaseException:
            self._work.behind(functools.partial(self.loans.give_back, claim))
            raise
        if self.loans.hold(claim, claim.offset, found.shape, found.row.name, out):
            return copy
        self._work.gpu.watcher.when_done(copy, functools.partial(self.loans.give_back, claim))
        return None

    def _claim(self, nbytes: int) -> Claim | None:
        """Claim a block that can be held, if there is room and a slot now."""
        return self.loans.claim(nbytes) if self.loans.has_slot else None

    def borrow(self, descriptor: TensorDescriptor) -> Any:
        """Make a view of a tensor of the peer; it is released behind what is done with it.

        Raises:
            PeerProtocolError: The descriptor is invalid.
        """
        offset = descriptor.offset - DEVICE_OFFSET
        with self._work.gpu.current():
            tensor = self._borrows.borrow(
                offset, descriptor.shape, descriptor.dtype, descriptor.slot, descriptor.sequence
            )
        if tensor is None:
            raise PeerProtocolError(
                f"descriptor names bytes from {offset} on, shape {descriptor.shape} and slot {descriptor.slot}; the "
                f"peer's arena on the GPU has {len(self._shared.peers)} bytes and {SLOTS} slots"
            )
        return tensor


def _describe(offset: int, shape: tuple[int, ...], dtype: str, slot: int, sequence: int) -> TensorDescriptor:
    return TensorDescriptor(DEVICE_OFFSET + offset, shape, dtype, slot, sequence)
