"""A client process for tests: ``holding_client.py ADDRESS CHANNEL ARENA_BYTES``; prints "ready" and never ends.

It holds all of both arenas and has calls in flight.
"""

from __future__ import annotations

import sys
import time

import torch

from shmtransport import Client

address, channel, arena_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = Client(address, channel="doorbell" if channel == "doorbell" else "zmq", arena_bytes=arena_bytes)
held = client.call("fill", arena_bytes)
loan = client.empty((arena_bytes,), torch.uint8)
pending = [client.submit("nap", 1.0), client.submit("size", loan), client.submit("nap", 0.5)]
print("ready", flush=True)
time.sleep(60)
