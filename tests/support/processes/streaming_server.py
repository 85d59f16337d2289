"""A server process of either kind that has generators: ``streaming_server.py ADDRESS Server|threads|AsyncServer``.

"threads" is a Server with several. It prints "ready", serves until a signal, and prints "stopped".
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator

import torch

from shmtransport import AsyncServer, Server

address, kind = sys.argv[1:3]
server: Server | AsyncServer
server = AsyncServer(address) if kind == "AsyncServer" else Server(address, threads=3 if kind == "threads" else 1)
ended: list[int] = []


@server.method
def count(parts: int) -> Iterator[int]:
    """Yield the numbers below ``parts``; remember when this ends, however it does."""
    try:
        yield from range(parts)
    finally:
        ended.append(parts)


@server.method
def tensors(parts: int, size: int) -> Iterator[torch.Tensor]:
    for value in range(parts):
        yield server.empty((size,), torch.uint8).fill_(value % 256)


@server.method
def one_then_none() -> Iterator[int]:
    yield 1
    time.sleep(60)


@server.method
def ends() -> list[int]:
    """The arguments of the calls of ``count`` that have ended."""
    return ended


@server.method
def fill(size: int, value: int = 1) -> torch.Tensor:
    return server.empty((size,), torch.uint8).fill_(value)


@server.method
def echo(value: object = None) -> object:
    return value


async def count_in_the_loop(parts: int) -> AsyncIterator[int]:
    try:
        for number in range(parts):
            await asyncio.sleep(0)
            yield number
    finally:
        ended.append(parts)


async def main(server: AsyncServer) -> None:
    server.register("count_in_the_loop", count_in_the_loop)
    async with server:
        print("ready", flush=True)
        await server.serve()


if isinstance(server, AsyncServer):
    asyncio.run(main(server))
else:
    with server:
        print("ready", flush=True)
        server.serve()
print("stopped", flush=True)
