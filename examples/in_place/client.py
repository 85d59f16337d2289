"""Calls without a copy: ``python examples/in_place/client.py ipc:///tmp/in_place.ipc``.

The argument is written into the request arena, the result read in the reply arena, and the control messages pass
through shared memory, too.
"""

import sys

import torch

from shmtransport import Client

with Client(
    sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/in_place.ipc",
    channel="doorbell",
    arena_bytes=32 << 20,
    prefault=True,  # no page faults during the first calls
) as client:
    x = client.empty((1024, 2048), torch.float32)  # 8 MiB, used again for every call
    for step in range(100):
        x.fill_(step - 50)  # or any operation with out=x
        y = client.call("relu", x)
        if y[0, 0].item() != max(step - 50, 0):
            raise SystemExit(f"a wrong result: {y}")
        del y  # its room in the reply arena is free again
    statistics = client.statistics()
    print(f"sent and received {(statistics.tensor_bytes_sent + statistics.tensor_bytes_received) >> 20} MiB")
    print(f"copied {statistics.bytes_copied} bytes here, {client.call('copied')} at the server")
    print(f"{statistics.latency_seconds(0.5) * 1e3:.3f} ms a call (median)")
