"""A client process that is in the middle of something: ``streaming_client.py ADDRESS CHANNEL WHAT``; then "ready".

"stream": has taken two parts of ``endless``, and asks for no more. "hold": holds a result of ``fill`` that fills most
of its reply arena, and has asked for another. "call": is in a call of ``block``.
"""

from __future__ import annotations

import sys
import time

from shmtransport import Client

address, channel, what = sys.argv[1:4]
client = Client(address, channel=channel, arena_bytes=1 << 16)  # type: ignore[arg-type]
kept: list[object] = []
if what == "stream":
    stream = client.stream("endless")
    kept += [stream, next(stream), next(stream)]
elif what == "hold":
    kept += [client.call("fill", 40 << 10), client.submit("fill", 40 << 10)]
elif what == "call":
    kept.append(client.submit("block"))
    kept.append(client.submit("block"))
print("ready", flush=True)
time.sleep(60)
