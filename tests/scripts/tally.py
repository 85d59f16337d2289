"""A server process for tests: ``tally.py ADDRESS TOTAL_BYTES``; as server.py, and says who left.

Prints "ready", then "left N" for every client that has gone; "stopped" in the end. No more than TOTAL_BYTES of arenas.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from shmtransport import Server

total_bytes = int(sys.argv[2])
server = Server(sys.argv[1], max_total_arena_bytes=total_bytes)


@server.method
def echo(value: Any = None) -> Any:
    return value


@server.method
def sleep(seconds: float) -> None:
    time.sleep(min(seconds, 2.0))


@server.method
def fill(size: int, value: float) -> torch.Tensor:
    return server.empty((size,), torch.float32).fill_(value)


server.on_disconnect(lambda number: print(f"left {number}", flush=True))
with server:
    print("ready", flush=True)
    server.serve()
print("stopped", flush=True)
