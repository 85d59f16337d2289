"""Arenas on a GPU: tensors that never leave it. Only offset, shape and dtype of a tensor cross.

Rules that it keeps:

* a tensor is told to the peer when the GPU has completed it, and its block is free again when the GPU has passed the
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
from typing import Any

from ..core.borrows import Borrows
from ..core.loans import Loans
from ..core.tensors import Tensors
from ..errors import ArenaFull, DeviceError, PeerProtocolError
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

    __slots__ = ("__weakref__", "handle", "memory")

    def __init__(self, memory: DeviceMemory, offset: int) -> None:
        self.memory = memory
        self.handle = memory.address + offset


class _Work:
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

    def view(self, data: Any, offset: int, row: DType, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Make a tensor over a part of an arena, and the part, which lives as long."""
        part = Range(data, offset)
        return part, self.tensors.over(part, shape, row, self.stream)

    def so_far(self, keep: Any = None) -> Fence:
        """Mark what the program has begun on its current stream."""
        return self.gpu.fence(self.tensors.current(self.stream), keep=keep)

    def behind(self, action: Callable[[], None]) -> None:
        """Do something once the GPU has done what it has been told so far; called where a tensor dies."""
        try:
            with self.gpu.current():
                fence = self.so_far()
        except DeviceError:  # it has failed, and does nothing any more
            action()
        else:
            self.gpu.watcher.when_done(fence, action)


class _EndedBehindFences(deque[Any]):
    """Loans that have ended; one is added once the GPU has passed the point at which its last view died."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self._work = work

    def append(self, loan: Any) -> None:
        self._work.behind(functools.partial(super().append, loan))


class _DeviceLoans(Loans):
    def __init__(self, data: Any, released: memoryview, tensors: Tensors, work: _Work) -> None:
        super().__init__(data, released, tensors, address=data.address)
        self._ended = _EndedBehindFences(work)


class _DeviceBorrows(Borrows):
    def __init__(self, data: Any, released: memoryview, tensors: Tensors, work: _Work) -> None:
        super().__init__(data, released, tensors)
        self._work = work

    def _end(self, anchor: Any) -> None:
        self._work.behind(functools.partial(super()._end, anchor))


class DeviceArena:
    """Both arenas that one connection has on a GPU.

    Args:
        gpu: The GPU.
        tensors: How tensors on it are made and looked at.
        stream: The connection's.
        own: This side's memory.
        peers: The other side's.
        released: The cells in which the peer releases this side's tensors, in its segment.
        releases: The cells in which this side releases the peer's, in its own segment.
    """

    def __init__(
        self,
        gpu: Gpu,
        tensors: DeviceTensors,
        stream: Any,
        own: DeviceMemory,
        peers: DeviceMemory,
        released: memoryview,
        releases: memoryview,
    ) -> None:
        self._work = work = _Work(gpu, tensors, stream)
        self._own = own
        made = Tensors(object, (), BY_TORCH, BY_NAME, work.view, _describe)
        self.loans: Loans = _DeviceLoans(own, released, made, work)
        self._borrows: Borrows = _DeviceBorrows(peers, releases, made, work)
        self._slots = len(releases)
        self._peers_bytes = len(peers)

    @property
    def borrowed(self) -> int:
        """How many tensors of the peer are borrowed."""
        return len(self._borrows)

    def is_over(self, peer_lives: Callable[[], bool]) -> bool:
        """Whether no tensor of this side is in use at the peer, now that the connection has ended."""
        self.loans.collect()
        return self.loans.held_by_peer == 0 or not peer_lives()

    def lend(self, shape: tuple[int, ...], row: DType) -> Any:
        """Lend an uninitialised tensor; None if there is no room now, or it has no elements."""
        with self._work.gpu.current():
            return self.loans.lend(shape, row.torch)

    def export(self, found: Found, out: list[TensorDescriptor]) -> Fence | None:
        """Append the descriptor of a tensor on the GPU, which is copied unless it is a loan of this arena.

        Returns:
            What the tensor may be told behind; None if there is no room for it.

        Raises:
            ArenaFull: The peer holds as many tensors as there are slots.
        """
        with self._work.gpu.current():
            if self.loans.has(found.start):
                held = self.loans.hold(found.start, found.pointer - self._own.address, found.shape, found.row.name, out)
                if held:
                    return self._work.so_far(keep=found.keep)
                if held is False:
                    raise _no_slot()
            claim = self.loans.claim(found.nbytes)
            if claim is None:
                self.loans.collect()
                claim = self.loans.claim(found.nbytes)
            if claim is None:
                return None
            self._work.tensors.after_use(found, self._work.stream)
            copy = self._copy(found, self._own.address + claim.offset)
            if not self.loans.hold(claim, claim.offset, found.shape, found.row.name, out):
                self._work.gpu.watcher.when_done(copy, lambda: self.loans.give_back(claim))
                raise _no_slot()
            return copy

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
                f"peer's arena on the GPU has {self._peers_bytes} bytes and {self._slots} slots"
            )
        return tensor

    def _copy(self, found: Found, address: int) -> Fence:
        stream = self._work.stream
        ask("cuMemcpyDtoDAsync", address, found.pointer, found.nbytes, stream.handle)
        return self._work.gpu.fence(stream, keep=found.keep)


def _describe(offset: int, shape: tuple[int, ...], dtype: str, slot: int, sequence: int) -> TensorDescriptor:
    return TensorDescriptor(DEVICE_OFFSET + offset, shape, dtype, slot, sequence)


def _no_slot() -> ArenaFull:
    return ArenaFull(f"{SLOTS} tensors on the GPU are unreleased, as many as may be; release results")
