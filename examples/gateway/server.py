"""Two servers in one event loop, at ADDRESS and ADDRESS.2, for a gateway: ``python examples/gateway/server.py``."""

import asyncio
import sys
from collections.abc import AsyncIterator

import torch

from shmtransport import AsyncServer

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/gateway.ipc"


async def serve(name: str, address: str) -> None:
    async with AsyncServer(address) as server:

        @server.method
        async def project(x: torch.Tensor) -> dict[str, object]:
            await asyncio.sleep(0.05)  # other calls go on meanwhile
            return {"from": name, "result": torch.mul(x, 2, out=server.empty(x.shape, x.dtype))}

        @server.method
        async def tokens(count: int) -> AsyncIterator[int]:
            try:
                for token in range(count):
                    await asyncio.sleep(0.001)
                    yield token
            finally:
                print(f"{name}: a stream has ended", flush=True)

        print("ready", flush=True)
        await server.serve()


async def main() -> None:
    await asyncio.gather(serve("one", ADDRESS), serve("two", f"{ADDRESS}.2"))


asyncio.run(main())
