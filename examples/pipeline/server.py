"""Multiplies by a matrix, one call at a time: ``python examples/pipeline/server.py ipc:///tmp/pipeline.ipc``."""

import sys

import torch

from shmtransport import Server

torch.set_num_threads(1)  # the client computes, too
server = Server(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/pipeline.ipc")
weight = torch.eye(1024) * 2


@server.method
def project(x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight, out=server.empty(x.shape, x.dtype))


with server:
    print("ready", flush=True)
    server.serve()
