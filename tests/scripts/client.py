"""A client process for tests: ``client.py ADDRESS WHAT ARENA_BYTES``; connects, prints "ready", then does WHAT.

"leave": exits without closing. "hold": holds a result of half its reply arena and a loan, and waits.
"call": is in a call of 60 s. "queue": has many calls queued behind one that takes a second. "fork": a forked child
exits by itself, then this process makes another call and prints what came back.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from shmtransport import Client

address, what, arena_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = Client(address, arena_bytes=arena_bytes, connect_timeout_s=30.0)
if what == "leave":
    result = client.call("fill", 16, 1.0)
    print("ready", flush=True)
elif what == "hold":
    result = client.call("fill", arena_bytes // 8, 1.0)
    loan = client.empty((arena_bytes // 2,), torch.uint8)
    print("ready", flush=True)
    time.sleep(60)
elif what == "call":
    pending = client.submit("sleep", 60)
    print("ready", flush=True)
    pending.result(timeout_s=60)
elif what == "queue":
    first = client.submit("sleep", 1.0)
    pending_all = [client.submit("fill", 16, 1.0) for _ in range(100)]
    print("ready", flush=True)
    time.sleep(60)
elif what == "fork":
    result = client.call("fill", 16, 3.0)
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    print("ready", flush=True)
    print(client.call("fill", 16, 4.0).sum().item(), result.sum().item(), flush=True)
    client.close()
