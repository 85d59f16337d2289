"""A client process for tests: ``checking_client.py ADDRESS NUMBER CHANNEL``; checks 100 results, says if all are so."""

from __future__ import annotations

import sys

import torch

from shmtransport import Client

number = int(sys.argv[2])
generator = torch.Generator().manual_seed(number)
with Client(sys.argv[1], channel=sys.argv[3], arena_bytes=256 * 1024) as client:
    print("ready", flush=True)
    wrong = 0
    for call in range(100):
        x = torch.full((1 + call * 37 % 5000,), float(1000 * number + call))
        wrong += not torch.equal(client.call("double", x), x * 2)
print("all results were right" if wrong == 0 else f"{wrong} results were wrong", flush=True)
