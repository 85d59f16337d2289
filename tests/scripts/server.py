"""A server process for tests: ``server.py ADDRESS``; prints "ready", serves until a signal, prints "stopped"."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from shmtransport import Server

server = Server(sys.argv[1])


@server.method
def echo(value: Any = None) -> Any:
    return value


@server.method
def double(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, 2, out=server.empty(x.shape, x.dtype))


@server.method
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@server.method
def fill(size: int, value: float) -> torch.Tensor:
    return server.empty((size,), torch.float32).fill_(value)


with server:
    print("ready", flush=True)
    server.serve()
print("stopped", flush=True)
