"""Scales batches, slowly, and counts what it is told: ``python examples/producer/server.py ipc:///tmp/producer.ipc``."""

import sys
import time

import torch

from shmtransport import Server

server = Server(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/producer.ipc")
told: list[int] = []
server.register("tell", told.append)  # one-way: the client waits for no answer


@server.method
def scale(batch: torch.Tensor) -> torch.Tensor:
    time.sleep(0.002)
    return torch.mul(batch, 2, out=server.empty(batch.shape, batch.dtype))


@server.method
def told_in_order() -> bool:
    return told == sorted(told)


with server:
    print("ready", flush=True)
    server.serve()
