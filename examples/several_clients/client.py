"""Three processes at one server: ``python examples/several_clients/client.py ipc:///tmp/several.ipc``."""

import multiprocessing
import sys

import torch

from shmtransport import Client

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/several.ipc"


def add_up(number: int) -> float:
    with Client(ADDRESS, arena_bytes=1 << 20) as client:  # make one after the fork: a child can't use its parent's
        for _ in range(10):
            client.call("add", torch.full((4,), float(number)))
        return float(client.call("total")[0].item())


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(3) as pool:
        for number, total in enumerate(pool.map(add_up, range(3))):
            print(f"client {number} has a total of {total:g}")
