"""A client that has got no further than making its segment: ``owner.py ARENA_BYTES RING_BYTES``.

Prints "ready", then its name; removes it when its input ends.
"""

from __future__ import annotations

import sys

from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import Segment

segment = Segment.create(segment_layout(int(sys.argv[1]), int(sys.argv[2])))
print("ready", flush=True)
print(segment.name, flush=True)
sys.stdin.read()
segment.close()
