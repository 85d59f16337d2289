"""What a process that tries the driver needs: ``from tests.support.cuda_driver.trial import *`` starts the device.

Functions of the driver are called as ``ok(cuda.cuStreamCreate(0))``, and refusals judged as ``code(cuda...)``.
A process of a pair has ``peer``, a socket to the other one.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as cuda

from tests.support.cuda_driver import calls, configure, counter, leaks

__all__ = [
    "PAGE", "allocate", "array", "calls", "code", "configure", "context", "counter", "ctypes", "cuda", "leaks", "look",
    "mmap", "ok", "os", "peer", "put", "register", "settle", "socket", "stream", "sys", "time", "until",
]  # fmt: skip

PAGE = mmap.PAGESIZE
_maps: list[Any] = []  # held until the process ends


def code(answer: tuple[Any, ...]) -> int:
    """What a call answered: 0 if it did what was asked."""
    return int(answer[0])


def ok(answer: tuple[Any, ...]) -> Any:
    """The result of a call that must succeed."""
    assert code(answer) == 0, answer[0]
    return answer[1] if len(answer) == 2 else answer[1:]


def look(address: Any, size: int) -> bytes:
    """The bytes there, device memory's as well."""
    return ctypes.string_at(int(address), size)


def put(address: Any, data: bytes) -> None:
    """Write there, as no GPU would let us into its memory."""
    ctypes.memmove(int(address), data, len(data))


def register(size: int = PAGE, flags: int = 0, value: int = 0) -> int:
    """The address of new registered memory, full of this value."""
    memory = mmap.mmap(-1, size)
    memory.write(bytes([value]) * size)
    _maps.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ok(cuda.cuMemHostRegister(address, size, flags))
    return address


def allocate(size: int = PAGE) -> int:
    """The address of new device memory."""
    return int(ok(cuda.cuMemAlloc(size)))


def stream(flags: int = 1) -> Any:
    """A new stream, which doesn't wait for the default stream unless flags are 0."""
    return ok(cuda.cuStreamCreate(flags))


def settle(*streams: Any) -> None:
    """Wait for all that these streams have to do."""
    for each in streams:
        ok(cuda.cuStreamSynchronize(each))


def until(happened: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so; fails if that takes too long."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


ok(cuda.cuInit(0))
context = ok(cuda.cuDevicePrimaryCtxRetain(0))
ok(cuda.cuCtxSetCurrent(context))
peer = socket.socket(fileno=int(sys.argv[1])) if len(sys.argv) > 1 else socket.socket()
