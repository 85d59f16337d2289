"""What the tests of asyncio share: event loops of each kind, servers beside them, and what must be free in the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import torch

from shmtransport import CHANNEL_KINDS, AsyncClient, AsyncServer, Server

try:
    import uvloop
except ImportError:
    uvloop = None

Run = Callable[[Coroutine[Any, Any, Any]], Any]
AnyServer = Server | AsyncServer

ARENA_BYTES = 64 * 1024

in_each_loop = pytest.mark.parametrize(
    "run",
    [
        pytest.param(asyncio.run, id="asyncio"),
        pytest.param(
            None if uvloop is None else uvloop.run,
            id="uvloop",
            marks=pytest.mark.skipif(uvloop is None, reason="uvloop is not installed"),
        ),
    ],
)
on_each_channel = pytest.mark.parametrize("channel", CHANNEL_KINDS)
by_each_server = pytest.mark.parametrize("kind", [Server, AsyncServer])


def server_for(run: Run, channel: str) -> type[AnyServer]:
    """The kind of server for a loop and a channel: each kind meets each of both, in half as many tests."""
    return Server if (run is asyncio.run) == (channel == "zmq") else AsyncServer


def register(server: AnyServer) -> None:
    """Methods that all of these tests need; none of them is a coroutine, so that both kinds of server can have them."""

    def fill(size: int, value: int = 1) -> torch.Tensor:
        return server.empty((size,), torch.uint8).fill_(value)

    server.register("echo", lambda value=None: value)
    server.register("size", lambda x: x.numel())
    server.register("double", lambda x: torch.mul(x, 2, out=server.empty(x.shape, x.dtype)))
    server.register("fill", fill)
    server.register("connection", lambda: server.connection_id)


@contextlib.asynccontextmanager
async def serving(server: AnyServer) -> AsyncIterator[None]:
    """Let a server of either kind serve, beside the running loop or in it; stopped and closed in the end."""
    if isinstance(server, AsyncServer):
        task = asyncio.create_task(server.serve())
        try:
            yield
        finally:
            server.stop()
            await task
            await server.close()
    else:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield
        finally:
            server.stop()
            await asyncio.to_thread(thread.join)
            server.close()


@contextlib.asynccontextmanager
async def served(
    address: str, kind: type[AnyServer] = AsyncServer, options: dict[str, Any] | None = None, **handlers: Any
) -> AsyncIterator[AnyServer]:
    """A server of this kind with the methods above and these handlers."""
    server = kind(address, **(options or {}))
    register(server)
    for name, handler in handlers.items():
        server.register(name, handler)
    async with serving(server):
        yield server


async def becomes(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether it comes true while the loop goes on."""
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    return condition()


async def settle() -> None:
    """Give every task that can go on its turn, several times."""
    for _ in range(20):
        await asyncio.sleep(0)


async def wholly_free(client: AsyncClient) -> bool:
    """Whether both arenas of a client, of ``ARENA_BYTES`` each, take a tensor as large as they are."""
    whole = torch.zeros(ARENA_BYTES, dtype=torch.uint8)
    result: torch.Tensor = await client.call("fill", ARENA_BYTES, 7)
    return bool(await client.call("size", whole) == ARENA_BYTES and (result == 7).all())


class Gate:
    """Holds handlers back until it is opened; for coroutines and for threads."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.entered = 0
        self.left = 0

    def wait(self) -> None:
        """In a handler that is a plain function."""
        self.entered += 1
        assert self._event.wait(60)
        self.left += 1

    async def passed(self) -> None:
        """In a handler that is a coroutine."""
        self.entered += 1
        while not self._event.is_set():
            await asyncio.sleep(0.001)
        self.left += 1

    def open(self) -> None:
        self._event.set()
