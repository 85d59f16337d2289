"""Calls the server beside it: ``python examples/echo/client.py ipc:///tmp/echo.ipc``."""

import sys

import torch

from shmtransport import Client

with Client(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/echo.ipc") as client:
    x = client.empty((1024, 2048), torch.bfloat16)  # an ordinary tensor, in shared memory
    x.fill_(21)
    y = client.call("double", x)  # a view of the server's memory; neither way copied anything
    print(y[0, 0].item(), tuple(y.shape), y.dtype)
    z = client.call("echo", torch.arange(5))  # outside the arena: copied in once
    print(z.tolist())
    print(client.statistics())
