"""A server process for tests: ``either_server.py ADDRESS Server|AsyncServer|uvloop``; "uvloop" is AsyncServer under it.

Prints "ready", then "left N" for every client that has gone; "stopped" in the end.
"""

from __future__ import annotations

import asyncio
import sys
import time

import torch

from shmtransport import AsyncServer, Server

kind = sys.argv[2]
server = Server(sys.argv[1]) if kind == "Server" else AsyncServer(sys.argv[1], drain_timeout_s=20.0)
server.on_disconnect(lambda number: print(f"left {number}", flush=True))
server.register("echo", lambda value=None: value)
server.register("size", lambda x: x.numel())


@server.method
def fill(size: int, value: int = 1) -> torch.Tensor:
    return server.empty((size,), torch.uint8).fill_(value)


async def nap(seconds: float, kept: torch.Tensor | None = None) -> float:
    await asyncio.sleep(seconds)
    return seconds


async def forget(x: torch.Tensor) -> None:
    """Drop the argument, and don't answer."""
    del x
    await asyncio.sleep(3600.0)


async def main(server: AsyncServer) -> None:
    async with server:
        print("ready", flush=True)
        await server.serve()


if isinstance(server, AsyncServer):
    server.register("nap", nap)
    server.register("forget", forget)
    if kind == "uvloop":
        import uvloop

        uvloop.run(main(server))
    else:
        asyncio.run(main(server))
else:
    server.register("nap", lambda seconds, kept=None: time.sleep(seconds))
    with server:
        print("ready", flush=True)
        server.serve()
print("stopped", flush=True)
