"""Serves features from several threads, and restarts when told to: ``python examples/feature_service/server.py``."""

import sys
import time

import torch

from shmtransport import Server

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/features.ipc"
table = torch.arange(1000.0).reshape(100, 10)


def serve(generation: int) -> bool:
    """Serve until told to restart or to stop; return whether to start again."""
    again = False
    with Server(ADDRESS, threads=4) as server:

        @server.method
        def features(rows: list[int], seconds: float = 0.0) -> torch.Tensor:
            time.sleep(seconds)  # a slow source; other clients are served meanwhile
            return torch.index_select(table, 0, torch.tensor(rows), out=server.empty((len(rows), 10), torch.float32))

        @server.method
        def restart() -> None:
            nonlocal again
            again = True
            server.stop()

        print("ready", flush=True)
        server.serve()
    print(f"generation {generation} has ended", flush=True)
    return again


number = 1
while serve(number):
    number += 1
