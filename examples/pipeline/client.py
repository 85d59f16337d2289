"""Computes while calls are in flight: ``python examples/pipeline/client.py ipc:///tmp/pipeline.ipc``.

Each chunk takes a call, and then work of our own. One after the other, each side waits while the other works. With all
calls in flight, the server works on the next chunk while we work on the last result.
"""

import asyncio
import sys
import time

import torch

from shmtransport import AsyncClient

torch.set_num_threads(1)


async def handle(client: AsyncClient, chunk: torch.Tensor) -> float:
    y = await client.call("project", chunk)
    return torch.mm(y, y.T).diagonal().sum().item()  # our own work, while the server goes on with other chunks


async def main(address: str) -> None:
    async with AsyncClient(address) as client:
        chunks = [client.empty((1024, 1024), torch.float32).fill_(number) for number in range(12)]
        started = time.perf_counter()
        one_by_one = [await handle(client, chunk) for chunk in chunks]
        middle = time.perf_counter()
        pipelined = await asyncio.gather(*(handle(client, chunk) for chunk in chunks))
        ended = time.perf_counter()
        print("the same results:", one_by_one == pipelined)
        print(f"one after the other {middle - started:.3f} s, in a pipeline {ended - middle:.3f} s:", end=" ")
        print(f"{1 - (ended - middle) / (middle - started):.0%} saved, {client.statistics().in_flight_peak} in flight")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/pipeline.ipc"))
