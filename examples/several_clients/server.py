"""Adds up, for each client on its own: ``python examples/several_clients/server.py ipc:///tmp/several.ipc``."""

import sys
from collections import defaultdict

import torch

from shmtransport import Server

server = Server(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/several.ipc")
totals: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(4))


@server.method
def add(x: torch.Tensor) -> None:
    totals[server.connection_id] += x  # a number is never given to another connection


@server.method
def total() -> torch.Tensor:
    return totals[server.connection_id]


def forget(connection_id: int) -> None:
    """However it went: closed, killed, or thrown out."""
    print(f"a client has left with a total of {totals.pop(connection_id)[0]:g}", flush=True)


server.on_disconnect(forget)
with server:
    print("ready", flush=True)
    server.serve()
