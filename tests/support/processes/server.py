"""A server process for tests: ``server.py ADDRESS [OPTIONS]``; prints "ready", serves until a signal, prints "stopped".

OPTIONS are those of Server, in JSON; with ``"tells": true`` it also prints "left N" for every client that has gone,
and ``"descriptors": N`` limits how many files it may have open.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import torch

from shmtransport import Server

options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
tells = options.pop("tells", False)
if "descriptors" in options:
    resource.setrlimit(resource.RLIMIT_NOFILE, (options["descriptors"], options.pop("descriptors")))
server = Server(sys.argv[1], **options)
kept: list[torch.Tensor] = []
if tells:
    server.on_disconnect(lambda number: print(f"left {number}", flush=True))


@server.method
def echo(value: Any = None) -> Any:
    return value


@server.method
def double(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, 2, out=server.empty(x.shape, x.dtype))


@server.method
def pid() -> int:
    return os.getpid()


@server.method
def work(seconds: float) -> None:
    """Compute in Python for so long, without giving the interpreter's lock away."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))


@server.method
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@server.method
def fill(size: int, value: float) -> torch.Tensor:
    return server.empty((size,), torch.float32).fill_(value)


@server.method
def total(x: torch.Tensor, seconds: float = 0.0) -> float:
    """The sum of a tensor, which is borrowed for so long."""
    time.sleep(seconds)
    return x.sum().item()


@server.method
def keep(x: torch.Tensor) -> None:
    """Borrow a tensor until ``drop``."""
    kept.append(x)


@server.method
def drop() -> None:
    kept.clear()


@server.method
def look(index: int) -> list[float]:
    """What a kept tensor holds now."""
    return kept[index].tolist()


@server.method
def statistics() -> dict[str, float]:
    """Some of this server's totals."""
    now = server.statistics()
    return {name: getattr(now, name) for name in ("calls", "stalls", "stall_seconds", "waits", "tensors_copied")}


@server.method
def fork(how: str) -> int:
    """Fork a child that ends in one of four ways; its exit code."""
    child = os.fork()
    if child == 0:
        if how == "at once":
            os._exit(0)
        if how == "in order":
            sys.exit(0)
        if how == "by an error":
            raise RuntimeError("the child's own")
        return -1  # as if it went on serving
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


with server:
    print("ready", flush=True)
    server.serve()
print("stopped", flush=True)
