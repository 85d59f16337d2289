"""A server process that is attacked: ``watched_server.py ADDRESS HANDSHAKE_TIMEOUT_S OPTIONS [AsyncServer]``.

OPTIONS are those of Server, or of AsyncServer if that is to be attacked, in JSON. It prints "ready", "left N" for every
client that has gone, and "stopped" at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import torch

from shmtransport import AsyncServer, Server
from shmtransport.endpoints.server_connection import ServerConnection

address, options = sys.argv[1], json.loads(sys.argv[3])
server: Server | AsyncServer = AsyncServer(address, **options) if sys.argv[4:] else Server(address, **options)
server._admission._options = replace(server._admission._options, handshake_timeout_s=float(sys.argv[2]))
server.on_disconnect(lambda number: print(f"left {number}", flush=True))
begun: list[str] = []
closed: list[str] = []
"""The generators that have begun and those that have ended, however they did: a thread may append to a list."""


@server.method
def echo(value: Any = None) -> Any:
    return value


@server.method
def double(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, 2, out=server.empty(x.shape, x.dtype))


@server.method
def fill(size: int, value: float) -> torch.Tensor:
    return server.empty((size,), torch.float32).fill_(value)


@server.method
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@server.method
def connection() -> int:
    return server.connection_id


@server.method
def tensors(sizes: list[int]) -> Iterator[torch.Tensor]:
    """Yield a tensor of each of these sizes, in bytes."""
    begun.append("tensors")
    try:
        for size in sizes:
            yield server.empty((size,), torch.uint8).fill_(1)
    finally:
        closed.append("tensors")


def count(parts: int, size: int = 0) -> Iterator[int | str]:
    """Yield the numbers below ``parts``, or as many texts of this size."""
    begun.append("count")
    try:
        for number in range(parts):
            yield "x" * size or number
    finally:
        closed.append("count")


async def count_in_the_loop(parts: int, size: int = 0) -> AsyncIterator[int | str]:
    with contextlib.closing(count(parts, size)) as made:
        for part in made:
            yield part


server.register("count", count_in_the_loop if isinstance(server, AsyncServer) else count)


@server.method
def held() -> list[int]:
    """How many generators have begun, how many have ended, and how many connections this process has not forgotten."""
    gc.collect()
    return [len(begun), len(closed), sum(isinstance(one, ServerConnection) for one in gc.get_objects())]


async def serve(server: AsyncServer) -> None:
    async with server:
        print("ready", flush=True)
        await server.serve()


if isinstance(server, AsyncServer):
    asyncio.run(serve(server))
else:
    with server:
        print("ready", flush=True)
        server.serve()
print("stopped", flush=True)
