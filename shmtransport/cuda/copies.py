"""Copies between one connection's arenas and a GPU, on a stream of their own, without waiting for them.

From and to pinned arenas they are direct. Where an arena is not pinned they go through a pinned buffer, with one more
copy by the processor; where no memory can be pinned at all, the driver copies while the caller waits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ..errors import DeviceError, PeerProtocolError
from ..memory.descriptor import TensorDescriptor
from ..memory.dtypes import DType
from ..memory.send_arena import DeviceCopy
from .device_arena import DeviceArena, Shared, Work
from .driver import ask
from .fences import Fence
from .gpu import Gpu
from .registration import Registration
from .tensors import DeviceTensors, Found, device_tensors


class Copies:
    """The copies of one connection.

    Args:
        gpu: The GPU.
        tensors: How tensors on the GPU are made and looked at.
        memories: The data areas of the connection's segments.

    Raises:
        DeviceError: The GPU has failed.
    """

    def __init__(self, gpu: Gpu, tensors: DeviceTensors, memories: Sequence[memoryview]) -> None:
        self._gpu = gpu
        self._tensors = tensors
        self.stream = gpu.new_stream()
        self._registration = Registration(gpu, memories)
        self.prepared: DeviceArena | None = None
        self.arena: DeviceArena | None = None
        """The connection's arenas on the GPU, if both sides have them."""

    @property
    def path(self) -> str:
        """How they go, in words: "pinned", or why not."""
        return self._registration.state

    def to_device(self, tensor: torch.Tensor, row: DType) -> Any:
        """Begin to copy a contiguous tensor to the GPU, and return the copy.

        What the caller's stream does with it comes after the copy. The tensor lives until the copy is complete.

        Raises:
            DeviceError: The GPU has failed.
            MemoryError: It has too little memory.
        """
        with self._gpu.current():
            copy, pointer = self._tensors.empty(tuple(tensor.shape), row, self.stream)
            if tensor.nbytes:
                fence = self._copy_in(tensor.data_ptr(), tensor.nbytes, pointer, tensor)
                self._tensors.before_use(copy, self.stream)
                self._gpu.watcher.when_done(fence, _nothing)
            return copy

    def empty(self, shape: tuple[int, ...], row: DType) -> Any:
        """Make an uninitialised tensor on the GPU: in its arena if there is one with room, else in other memory.

        Raises:
            DeviceError: The GPU has failed.
            MemoryError: It has too little memory.
        """
        tensor = None if self.arena is None else self.arena.lend(shape, row)
        if tensor is not None:
            return tensor
        with self._gpu.current():
            tensor, _ = self._tensors.empty(shape, row, self.stream)
            self._tensors.before_use(tensor, self.stream)
            return tensor

    def prepare(self, shared: Shared) -> None:
        """Make the connection's arenas on the GPU, to be used from ``use_arena`` on."""
        self.prepared = DeviceArena(Work(self._gpu, self._tensors, self.stream), shared)

    def use_arena(self) -> None:
        """Use the arenas on the GPU, if they are prepared: the other side has them as well."""
        self.arena = self.prepared

    def abandon(self) -> None:
        """In a forked child: what dies here is still in use in the parent."""
        if self.prepared is not None:
            self.prepared.abandon()

    def export(self, found: Found, out: list[TensorDescriptor]) -> Fence | None:
        """Append the descriptor of a tensor in the GPU's arena; None if there is no such arena, or no room."""
        return None if self.arena is None else self.arena.export(found, out)

    def borrow(self, descriptor: TensorDescriptor) -> Any:
        """Make a view of a tensor in the peer's arena on the GPU.

        Raises:
            PeerProtocolError: There is no such arena, or the descriptor is invalid.
        """
        if self.arena is None:
            raise PeerProtocolError("descriptor names an arena on the GPU, and this connection has none")
        return self.arena.borrow(descriptor)

    def find(self, value: Any) -> Found | None:
        """Look at a tensor on this GPU; None for anything else."""
        return self._tensors.find(value)

    def to_arena(self, found: Found, address: int) -> Fence:
        """Begin to copy a tensor on the GPU to an arena; it is there, and may change, once the fence is done.

        Raises:
            DeviceError: The GPU has failed.
        """
        with self._gpu.current():
            self._tensors.after_use(found, self.stream)
            return self._copy_out(found, address)

    def when_done(self, copy: DeviceCopy, action: Callable[[], None]) -> None:
        """Call ``action`` once a copy is complete, or the GPU has failed; in any thread."""
        self._gpu.watcher.when_done(copy, action)

    def close(self) -> None:
        """Give back the memory behind the last copy, or soon if the GPU has failed, since nothing moves there then.

        The peer may still use tensors in this side's arena on the GPU, which stays for as long.
        """
        arena, self.arena, self.prepared = self.arena, None, None
        if arena is not None and not arena.is_over():
            self._gpu.watcher.linger(arena.is_over, arena)
        try:
            with self._gpu.current():
                last = self._gpu.fence(self.stream)
        except DeviceError:
            self._gpu.watcher.later(self._registration.close)
        else:
            self._gpu.watcher.when_done(last, self._registration.close)

    def _way(self, address: int, nbytes: int) -> tuple[list[tuple[int, int]], int | None]:
        """The ranges of an arena to copy one by one, and the buffer to copy through if it is not pinned."""
        ranges = self._registration.ranges(address, nbytes)
        self._gpu.count_copy(pinned=ranges is not None)
        if ranges is not None:
            return ranges, None
        return [(address, nbytes)], self._gpu.staging.take(nbytes)

    def _copy_in(self, address: int, nbytes: int, pointer: int, keep: Any) -> Fence:
        ranges, buffer = self._way(address, nbytes)
        staging = self._gpu.staging
        if buffer is not None:
            ctypes.memmove(buffer, address, nbytes)
            ask("cuMemcpyHtoDAsync", pointer, buffer, nbytes, self.stream.handle)
            return self._gpu.fence(self.stream, finish=functools.partial(staging.give_back, buffer, nbytes))
        for start, size in ranges:
            ask("cuMemcpyHtoDAsync", pointer + start - address, start, size, self.stream.handle)
        return self._gpu.fence(self.stream, keep=keep)

    def _copy_out(self, found: Found, address: int) -> Fence:
        nbytes, pointer = found.nbytes, found.pointer
        ranges, buffer = self._way(address, nbytes)
        staging = self._gpu.staging
        if buffer is not None:
            ask("cuMemcpyDtoHAsync", buffer, pointer, nbytes, self.stream.handle)

            def finish() -> None:
                ctypes.memmove(address, buffer, nbytes)
                staging.give_back(buffer, nbytes)

            return self._gpu.fence(self.stream, finish=finish, keep=found.keep)
        for start, size in ranges:
            ask("cuMemcpyDtoHAsync", start, pointer + start - address, size, self.stream.handle)
        return self._gpu.fence(self.stream, keep=found.keep)


NewCopies: TypeAlias = Callable[[Sequence[memoryview]], Copies]
"""Makes the copies of a connection from the data areas of its segments."""


def copies_for(gpu: Gpu) -> NewCopies:
    """Return what makes the copies of each connection that uses this GPU."""
    return functools.partial(Copies, gpu, device_tensors(gpu))


def _nothing() -> None:
    """The fence itself has let go of what it kept."""
