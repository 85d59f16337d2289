"""Serves two methods at an address: ``python examples/echo/server.py ipc:///tmp/echo.ipc``."""

import sys

import torch

from shmtransport import Server

server = Server(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/echo.ipc")


@server.method
def echo(x: torch.Tensor) -> torch.Tensor:
    return x  # lies in the client's arena: copied once, into the reply arena


@server.method
def double(x: torch.Tensor) -> torch.Tensor:
    out = server.empty(x.shape, x.dtype)  # in the reply arena: not copied
    return torch.mul(x, 2, out=out)


with server:
    print("ready", flush=True)
    server.serve()  # until Ctrl-C
