"""Produces faster than the server takes: ``python examples/producer/client.py ipc:///tmp/producer.ipc``.

The arenas hold eight batches each. ``submit`` waits for the server to release some, and results for which there is no
room wait at the server until this side has dropped others. Nothing is lost, and nothing grows.
"""

import sys
from collections import deque

import torch

from shmtransport import Client, PendingReply

MIB = 1 << 20
BATCHES = 100

with Client(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/producer.ipc", arena_bytes=8 * MIB) as client:
    pending: deque[PendingReply] = deque()
    kept: deque[torch.Tensor] = deque(maxlen=6)  # the last six results stay here for a while
    right = 0

    def take() -> None:
        global right
        result = pending.popleft().result()
        right += int(result[0]) == 2 * right
        kept.append(result)

    for number in range(BATCHES):
        pending.append(client.submit("scale", torch.full((MIB // 4,), float(number))))
        client.send("tell", number)
        if len(pending) == 12:
            take()
    while pending:
        take()
    print(f"{right} of {BATCHES} results, in order; told in order: {client.call('told_in_order')}")
    print("waited for room:", client.statistics().stalls > 0)
