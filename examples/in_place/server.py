"""Answers in the caller's arena: ``python examples/in_place/server.py ipc:///tmp/in_place.ipc``."""

import sys

import torch

from shmtransport import Server

server = Server(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/in_place.ipc")


@server.method
def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x, min=0, out=server.empty(x.shape, x.dtype))  # computed where the client will read it


@server.method
def copied() -> int:
    return server.statistics().bytes_copied


with server:
    print("ready", flush=True)
    server.serve()
