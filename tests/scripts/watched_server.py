"""A server process that is attacked: ``watched_server.py ADDRESS HANDSHAKE_TIMEOUT_S OPTIONS``; prints "ready".

OPTIONS are those of Server, in JSON. It prints "left N" for every client that has gone, and "stopped" at its end.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from shmtransport import Server

server = Server(sys.argv[1], **json.loads(sys.argv[3]))
server._admission._limits = replace(server._admission._limits, handshake_timeout_s=float(sys.argv[2]))
server.on_disconnect(lambda number: print(f"left {number}", flush=True))


@server.method
def echo(value: Any = None) -> Any:
    return value


@server.method
def double(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, 2, out=server.empty(x.shape, x.dtype))


@server.method
def fill(size: int, value: float) -> torch.Tensor:
    return server.empty((size,), torch.float32).fill_(value)


@server.method
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@server.method
def connection() -> int:
    return server.connection_id


with server:
    print("ready", flush=True)
    server.serve()
print("stopped", flush=True)
