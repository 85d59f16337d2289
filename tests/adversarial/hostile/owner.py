"""A client that has got no further than making its segment and its bell: ``owner.py ARENA_BYTES RING_BYTES``.

Prints "ready", then the names of both; removes them when its input ends.
"""

from __future__ import annotations

import sys

from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.bell import Bell
from shmtransport.memory.segment import Segment

segment, bell = Segment.create(segment_layout(int(sys.argv[1]), int(sys.argv[2]))), Bell.create()
print("ready", flush=True)
print(segment.name, bell.name, flush=True)
sys.stdin.read()
bell.close()
segment.close()
