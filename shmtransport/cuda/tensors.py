"""Tensors on a GPU as a program shows them: torch's, or this module's own where torch is built without CUDA.

Streams: what a program does with such a tensor, it does on its *current* stream. That is torch's; without it, the
stream of the connection, which the server tells its handlers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack

from ..errors import LocalProtocolError
from ..memory.dtypes import BY_NAME, BY_TORCH, DType
from ..memory.plain import row_of
from .driver import errors_in_words, libraries
from .gpu import Gpu


class Found(NamedTuple):
    """The memory of a tensor on the GPU, contiguous.

    ``start`` is where its storage begins, and ``keep`` keeps that. ``stream`` is the handle of the stream that wrote
    it, where the tensor itself tells.
    """

    pointer: int
    start: int
    nbytes: int
    shape: tuple[int, ...]
    row: DType
    keep: Any
    stream: int | None = None


class DeviceTensors(ABC):
    """How tensors on one GPU are made and looked at."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], row: DType, stream: Any) -> tuple[Any, int]:
        """Make a tensor that is first written on this stream; return it and its address.

        Raises:
            MemoryError: The GPU has too little memory.
        """

    @abstractmethod
    def over(self, part: Any, shape: tuple[int, ...], row: DType, stream: Any) -> Any:
        """Make a tensor over memory that begins at ``part.handle``; its storage keeps ``part``."""

    @abstractmethod
    def current(self, stream: Any) -> Any:
        """Return the program's current stream, as cuda-core's; ``stream`` is the connection's."""

    @abstractmethod
    def before_use(self, tensor: Any, stream: Any) -> None:
        """Let the program's current stream use a tensor only behind what this stream has begun."""

    @abstractmethod
    def after_use(self, found: Found, stream: Any) -> None:
        """Let this stream wait for what the program has begun to do with a tensor."""

    @abstractmethod
    def find(self, value: Any) -> Found | None:
        """Look at a tensor on this GPU; None for anything else.

        Raises:
            LocalProtocolError: It is one, and can't be sent.
        """


def device_tensors(gpu: Gpu) -> DeviceTensors:
    """Choose how this program shows tensors on a GPU."""
    return TorchTensors(gpu) if torch.cuda.is_available() else OwnTensors(gpu)


class TorchTensors(DeviceTensors):
    """torch's own, in memory of torch's own."""

    def __init__(self, gpu: Gpu) -> None:
        self._device = torch.device("cuda", gpu.ordinal)
        # torch keeps what was freed for the stream that it was made on, so that stream must not be a connection's.
        self._making = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...], row: DType, stream: Any) -> tuple[Any, int]:
        try:
            with torch.cuda.stream(self._making):
                tensor = torch.empty(shape, dtype=row.torch, device=self._device)
            tensor.record_stream(self._outside(stream))
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        return tensor, tensor.data_ptr()

    def over(self, part: Any, shape: tuple[int, ...], row: DType, stream: Any) -> Any:
        nbytes = math.prod(shape) * row.itemsize
        buffer = libraries().core.Buffer.from_handle(part.handle, nbytes, owner=part)
        return torch.utils.dlpack.from_dlpack(buffer).view(row.torch).view(shape)

    def current(self, stream: Any) -> Any:
        return libraries().core.Stream.from_handle(torch.cuda.current_stream(self._device).cuda_stream)

    def before_use(self, tensor: Any, stream: Any) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._outside(stream))
        tensor.record_stream(current)

    def after_use(self, found: Found, stream: Any) -> None:
        self._outside(stream).wait_stream(torch.cuda.current_stream(self._device))

    def find(self, value: Any) -> Found | None:
        if not isinstance(value, torch.Tensor) or value.device != self._device:
            return None
        tensor = value.detach().resolve_conj().resolve_neg().contiguous()
        row = row_of(tensor.dtype)
        start = tensor.untyped_storage().data_ptr()
        return Found(tensor.data_ptr(), start, tensor.nbytes, tuple(tensor.shape), row, tensor)

    def _outside(self, stream: Any) -> torch.cuda.Stream:
        outside: torch.cuda.Stream = torch.cuda.ExternalStream(int(stream.handle), self._device)  # type: ignore[no-untyped-call]
        return outside


class CudaTensor:
    """A contiguous tensor on a GPU, for programs whose torch is built without CUDA.

    Libraries that know ``__cuda_array_interface__`` can use it. A dtype that numpy lacks is shown there as the integer
    of its size; ``dtype`` names the true one.
    """

    def __init__(self, memory: Any, shape: tuple[int, ...], row: DType, ordinal: int, stream: int) -> None:
        self._memory = memory
        self._row = row
        self._stream = stream
        self.shape = shape
        self.device = torch.device("cuda", ordinal)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements, as torch's."""
        return self._row.torch

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self._row.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """See https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3."""
        return {
            "shape": self.shape,
            "typestr": self._row.carrier.str,
            "data": (int(self._memory.handle), False),
            "version": 3,
            "stream": self._stream,
        }

    def __repr__(self) -> str:
        return f"<CudaTensor of shape {self.shape}, {self._row.name}, on {self.device}>"


class OwnTensors(DeviceTensors):
    """``CudaTensor``, and whatever has ``__cuda_array_interface__``."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def empty(self, shape: tuple[int, ...], row: DType, stream: Any) -> tuple[Any, int]:
        nbytes = math.prod(shape) * row.itemsize
        with errors_in_words():
            memory = self._gpu.memory.allocate(max(nbytes, 1), stream=stream)
        return CudaTensor(memory, shape, row, self._gpu.ordinal, int(stream.handle)), int(memory.handle)

    def over(self, part: Any, shape: tuple[int, ...], row: DType, stream: Any) -> Any:
        return CudaTensor(part, shape, row, self._gpu.ordinal, int(stream.handle))

    def current(self, stream: Any) -> Any:
        return stream

    def before_use(self, tensor: Any, stream: Any) -> None:
        """The program works on the same stream."""

    def after_use(self, found: Found, stream: Any) -> None:
        if found.stream is not None and found.stream != int(stream.handle):
            self._gpu.wait_for(found.stream, stream)

    def find(self, value: Any) -> Found | None:
        if isinstance(value, torch.Tensor) or not hasattr(type(value), "__cuda_array_interface__"):
            return None
        described = value.__cuda_array_interface__
        shape = tuple(described["shape"])
        dtype = np.dtype(described["typestr"])
        row = BY_TORCH[value.dtype] if isinstance(value, CudaTensor) else BY_NAME.get(dtype.name)
        if row is None or not _is_contiguous(described, shape, dtype.itemsize):
            raise LocalProtocolError(
                f"a {type(value).__name__} of shape {shape} and {dtype} can't be sent: only contiguous ones can, of "
                f"these dtypes: {', '.join(BY_NAME)}"
            )
        pointer, nbytes = int(described["data"][0]), math.prod(shape) * row.itemsize
        return Found(pointer, pointer, nbytes, shape, row, value, described.get("stream"))


def _is_contiguous(described: dict[str, Any], shape: tuple[int, ...], itemsize: int) -> bool:
    strides = described.get("strides")
    if strides is None:
        return True
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
