"""A client process for tests: ``copying_client.py ADDRESS``; has a tensor copied to a GPU and back, again and again."""

from __future__ import annotations

import sys

import torch

from shmtransport import Client

client = Client(sys.argv[1], channel="doorbell", arena_bytes=1 << 20)
pending = client.submit("there_and_back", torch.ones(1000))
print("ready", flush=True)
while True:
    pending.result()
    pending = client.submit("there_and_back", torch.ones(1000))
