"""``server.py ADDRESS blocking|async``: a server; prints "ready", ends by a signal."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any

import torch

from shmtransport import AsyncServer, Server
from tests.adversarial.soak.content import reply_to


def register(server: Server | AsyncServer) -> None:
    """The methods that the soak's clients call."""

    def flip(tag: int, value: Any, *, in_place: bool) -> dict[str, Any]:
        def answer(one: Any) -> Any:
            if isinstance(one, torch.Tensor):
                return reply_to(one, server.empty_like(one) if in_place else torch.empty_like(one))
            if isinstance(one, (list, tuple)):
                return type(one)(answer(item) for item in one)
            return one

        return {"tag": tag, "value": answer(value)}

    def fail(text: str) -> None:
        raise ValueError(text)

    server.register("flip", flip)
    server.register("fail", fail)
    server.register("sleep", lambda seconds: time.sleep(min(seconds, 1.0)))


async def serve_in_a_loop(address: str) -> None:
    async with AsyncServer(address) as server:
        register(server)
        print("ready", flush=True)
        await server.serve()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("shmtransport").setLevel(logging.CRITICAL)  # handlers fail on purpose, clients are killed
    if sys.argv[2] == "async":
        asyncio.run(serve_in_a_loop(sys.argv[1]))
    else:
        with Server(sys.argv[1]) as blocking:
            register(blocking)
            print("ready", flush=True)
            blocking.serve()
