"""Asks for features, with deadlines, while the server restarts: ``python examples/feature_service/client.py``.

A slow call holds up no other client, a call that takes too long is given up, and what is safe to repeat is repeated
once the server is back.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from shmtransport import CallTimeout, Client

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/features.ipc"

with Client(ADDRESS) as client, Client(ADDRESS) as other:
    slow = other.submit("features", [7], 0.5)
    print("served beside a slow call:", client.call("features", [3])[0, :3].tolist(), "| slow one done:", slow.done())
    try:
        client.with_options(timeout_s=0.1).call("features", [5], 0.5)
    except CallTimeout as error:
        print("given up:", str(error).split(";")[0])
    print("the slow one:", slow.result()[0, :3].tolist())

    repeating = client.with_options(retries=5, timeout_s=20)

    def ask(row: int) -> float:
        if row == 20:
            client.send("restart")
        return float(repeating.call("features", [row])[0, 0])

    rows = range(100)
    with ThreadPoolExecutor(4) as threads:
        print("right through the restart:", list(threads.map(ask, rows)) == [10.0 * row for row in rows])
