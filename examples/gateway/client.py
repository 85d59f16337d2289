"""A gateway over the two servers of ``gateway/server.py``: ``python examples/gateway/client.py [ADDRESS]``."""

import asyncio
import sys
from typing import Any

import torch

from shmtransport import AsyncClient

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/gateway.ipc"


class Gateway:
    """Sends each call to the server with the fewest in flight."""

    def __init__(self, *clients: AsyncClient) -> None:
        self.in_flight = dict.fromkeys(clients, 0)

    async def call(self, method: str, x: torch.Tensor) -> dict[str, Any]:
        client = min(self.in_flight, key=self.in_flight.__getitem__)
        self.in_flight[client] += 1
        try:
            return dict(await client.call(method, x))
        finally:
            self.in_flight[client] -= 1


async def main() -> None:
    async with AsyncClient(ADDRESS) as one, AsyncClient(f"{ADDRESS}.2") as two:
        gateway = Gateway(one, two)
        replies = await asyncio.gather(*(gateway.call("project", torch.full((4,), float(i))) for i in range(10)))
        print("all right:", all(torch.equal(r["result"], torch.full((4,), 2.0 * i)) for i, r in enumerate(replies)))
        print("shared out:", {name: sum(r["from"] == name for r in replies) for name in ("one", "two")})
        print("a stream:", [token async for token in two.stream("tokens", 5)])
        async with one.stream("tokens", 10**6) as tokens:
            print("cut short:", [await anext(tokens) for _ in range(3)])


asyncio.run(main())
