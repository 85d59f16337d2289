"""A client process for tests: ``client.py ADDRESS CHANNEL WHAT [ARENA_BYTES]``; connects, prints "ready", does WHAT.

"idle": nothing, for a minute. "leave": exits without closing. "hold": holds a result of half its reply arena, and a
loan. "hold then ask for more": has asked for two more results of that size, too. "call": is in a call of 0.7 s.
"queue": has many calls queued behind such a one. "flood": as many as there is room for, and one that
waits for more. "unread": reads none of many long replies. "wait": waits for SIGCONT with calls in flight, looks at
their results and prints "right".
"""

from __future__ import annotations

import signal
import sys
import threading
import time

import torch

from shmtransport import Client

address, channel, what = sys.argv[1:4]
arena_bytes = int(sys.argv[4]) if len(sys.argv) > 4 else 1 << 20
client = Client(address, channel=channel, arena_bytes=arena_bytes, connect_timeout_s=30.0)


def ready() -> None:
    print("ready", flush=True)


if what == "idle":
    ready()
    time.sleep(60)
elif what == "leave":
    result = client.call("fill", 16, 1.0)
    ready()
elif what == "hold":
    result = client.call("fill", arena_bytes // 8, 1.0)
    loan = client.empty((arena_bytes // 2,), torch.uint8)
    ready()
    time.sleep(60)
elif what == "hold then ask for more":
    result = client.call("fill", arena_bytes // 8, 1.0)
    more = [client.submit("fill", arena_bytes // 8, 1.0) for _ in range(2)]
    time.sleep(0.2)
    ready()
    more[-1].result()
elif what == "call":
    pending = client.submit("sleep", 0.7)
    ready()
    pending.result(timeout_s=60)
elif what == "queue":
    first = client.submit("sleep", 0.7)
    pending_all = [client.submit("fill", 16, 1.0) for _ in range(100)]
    ready()
    time.sleep(60)
elif what == "flood":
    first = client.submit("sleep", 0.7)
    threading.Timer(0.3, ready).start()
    flood = [client.submit("echo", "x" * 60_000) for _ in range(100)]
    time.sleep(60)
elif what == "unread":
    unread = [client.submit("echo", "x" * 30_000) for _ in range(3)]
    for _ in range(17):
        unread.append(client.submit("echo", "x" * 30_000))
        time.sleep(0.01)
    ready()
    time.sleep(60)
elif what == "wait":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
    results = [client.submit("fill", 100, float(value)) for value in range(50)]
    ready()
    signal.sigwait([signal.SIGCONT])
    right = all(torch.equal(reply.result(), torch.full((100,), float(i))) for i, reply in enumerate(results))
    print("right" if right and client.call("echo", 1) == 1 else "wrong", flush=True)
    client.close()
