"""A server with a GPU, on the stand-in for CUDA's driver: ``cuda_server.py ADDRESS LIBRARY SETTINGS OPTIONS``.

LIBRARY is the stand-in's path, or empty for the driver of this machine. SETTINGS are the stand-in's, OPTIONS the
server's, both in JSON; with ``"asynchronous": true`` it is an ``AsyncServer``, ``"ordinal"`` is the GPU's number, and
``"piece_bytes"`` the most that is pinned at once. It prints "ready" and serves until a
signal; then it prints, in JSON, what it has left behind on the GPU.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from shmtransport import AsyncServer, Server
from shmtransport.cuda import registration
from shmtransport.cuda.driver import ask
from shmtransport.memory.dtypes import BY_TORCH

address, library = sys.argv[1:3]
os.environ.update({f"FAKE_CUDA_{name}": str(value) for name, value in json.loads(sys.argv[3]).items()})
options = json.loads(sys.argv[4])
asynchronous, ordinal = options.pop("asynchronous", False), options.pop("ordinal", 0)
registration.PIECE_BYTES = options.pop("piece_bytes", registration.PIECE_BYTES)
stand_in = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL) if library else None


options.setdefault("device", f"cuda:{ordinal}")
server: Any = (AsyncServer if asynchronous else Server)(address, **options)
kept: list[Any] = []


def counter(name: str) -> int:
    """One of the stand-in's counters."""
    assert stand_in is not None
    stand_in.fake_cuda_counter.restype = ctypes.c_ulonglong
    return int(stand_in.fake_cuda_counter(name.encode()))


@server.method
def there_and_back(x: torch.Tensor) -> Any:
    """Copy a tensor to the GPU, and return that copy."""
    return server.to_device(x)


@server.method
def nested(x: torch.Tensor, y: torch.Tensor) -> Any:
    return {"x": [server.to_device(x)], "y": (server.to_device(y), 7)}


@server.method
def parts(x: torch.Tensor, count: int) -> Iterator[Any]:
    """Yield this many copies of a tensor."""
    for _ in range(count):
        yield server.to_device(x)


@server.method
def keep(x: torch.Tensor) -> None:
    """Copy a tensor to the GPU, and answer at once."""
    kept.append(server.to_device(x))


@server.method
def kept_again(index: int) -> Any:
    return kept[index]


@server.method
def unsendable(x: torch.Tensor) -> Any:
    return [server.to_device(x), object()]


@server.method
def mixed(x: torch.Tensor) -> Any:
    return [server.to_device(x), torch.ones(1000)]


@server.method
def with_too_large(x: torch.Tensor) -> Any:
    return [server.to_device(x), torch.ones(1 << 24)]


@server.method
def echo(value: Any) -> Any:
    return value


def fill(tensor: Any, value: int) -> Any:
    """Set all bytes of a tensor on the GPU, as a kernel would: later."""
    ask("cuMemsetD8Async", pointer(tensor), value, tensor.nbytes, server.cuda_stream.handle)
    return tensor


def pointer(tensor: Any) -> int:
    address, _ = tensor.__cuda_array_interface__["data"]
    return int(address)


@server.method
def made(count: int, value: int) -> Any:
    """A tensor of bytes that is made in the caller's arena on the GPU."""
    with server._gpu.current():
        return fill(server.empty((count,), torch.uint8, device=f"cuda:{ordinal}"), value)


@server.method
def copy_later(x: Any) -> None:
    """Have the GPU copy a tensor that is there, and answer at once."""
    with server._gpu.current():
        copy = server._new_copies([]).empty(x.shape, BY_TORCH[x.dtype])
        ask("cuMemcpyDtoDAsync", pointer(copy), pointer(x), x.nbytes, server.cuda_stream.handle)
    kept.append(copy)


@server.method
def keep_borrowed(x: Any) -> None:
    kept.append(x)


@server.method
def forget() -> None:
    kept.clear()


@server.method
def kind(x: Any) -> str:
    return type(x).__name__


@server.method
def facts() -> dict[str, Any]:
    """How tensors get to the GPU, and what was copied how."""
    now = server.statistics()
    return {"path": server.device_path, "pinned": now.pinned_copies, "bounced": now.bounced_copies}


@server.method
def count(name: str) -> int:
    return counter(name)


@server.method
def held() -> int:
    """How many blocks of its caller's reply arena are held."""
    (connection,) = [one for one in server._connections.values() if one.connection_id == server.connection_id]
    loans = connection.memory.send_arena.loans
    loans.collect()
    return int(loans.blocks)


async def serve_async() -> None:
    async with server:
        print("ready", flush=True)
        await server.serve()


if asynchronous:
    asyncio.run(serve_async())
else:
    with server:
        print("ready", flush=True)
        server.serve()
kept.clear()
names = ("registered_bytes", "unregistered_in_use", "unmapped_while_registered", "context_synchronizations")
print(json.dumps({name: counter(name) for name in names} if stand_in else {}), flush=True)
