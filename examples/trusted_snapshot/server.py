"""Picks rows, and changes its mind: ``python examples/trusted_snapshot/server.py ipc:///tmp/snapshot.ipc``.

It plays a server that can't be trusted: it keeps what it has answered, and overwrites it when it likes.
"""

import sys

import torch

from shmtransport import Server

server = Server(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/snapshot.ipc")
kept: list[torch.Tensor] = []


@server.method
def pick(scores: torch.Tensor) -> torch.Tensor:
    kept.append(torch.argmax(scores, dim=1, out=server.empty(scores.shape[:1], torch.int64)))
    return kept[-1]


@server.method
def tamper() -> None:
    for rows in kept:
        rows.fill_(1_000_000)


with server:
    print("ready", flush=True)
    server.serve()
