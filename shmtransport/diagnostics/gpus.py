"""Facts about this machine's GPUs: whether arenas can be pinned for them, and shared on them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..cuda.device_memory import DeviceMemory
from ..cuda.driver import ask, libraries
from ..cuda.gpu import Gpu
from ..errors import DeviceError
from ..units import MIB

_TRIED_BYTES = 1 * MIB


@dataclass(frozen=True)
class GpuFacts:
    """One GPU.

    Attributes:
        ordinal: its number among those that this process sees.
        name: the product's name.
        uuid: which GPU it is, in all processes.
        not_pinned: why memory can't be pinned for it; empty if it can.
        not_shared: why memory on it can't be shared with another process; empty if it can.
    """

    ordinal: int
    name: str
    uuid: str
    not_pinned: str
    not_shared: str


def gpu_facts() -> tuple[tuple[GpuFacts, ...], str]:
    """Try each GPU that this process sees; return the facts, or why there is none."""
    try:
        libraries()
        return tuple(_facts(ordinal) for ordinal in range(ask("cuDeviceGetCount"))), ""
    except DeviceError as error:
        return (), str(error)


def _facts(ordinal: int) -> GpuFacts:
    gpu = Gpu(ordinal)
    name = ask("cuDeviceGetName", 128, ask("cuDeviceGet", ordinal)).rstrip(b"\0").decode(errors="replace")
    pinned, shared = _error_of(lambda: _pin(gpu)), _error_of(lambda: DeviceMemory.make(gpu, _TRIED_BYTES))
    return GpuFacts(ordinal, name, gpu.uuid.hex(), pinned, shared)


def _pin(gpu: Gpu) -> None:
    with mmap.mmap(-1, _TRIED_BYTES) as memory, gpu.current():
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        ask("cuMemHostRegister", address, _TRIED_BYTES, 0)
        ask("cuMemHostUnregister", address)


def _error_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except DeviceError as error:
        return str(error)
    return ""
