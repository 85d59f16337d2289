"""A client that breaks the rules, in a process of its own: ``impostor.py ADDRESS CHANNEL WHAT``; then says "ready".

"too long": sends a message by ZeroMQ that is longer than agreed, so that ZeroMQ cuts it off. "unfinished": says Hello,
names a segment, and never looks at the answer. "half a record": has announced a message by ring of which half is there.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import zmq

from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import DEFAULT_MAX_MESSAGE_BYTES, Attach, Hello
from tests.adversarial.hostile.peers import ARENA_BYTES, Impostor, Wire
from tests.support.rings import PUBLISHED

address, channel, what = sys.argv[1:4]
context: zmq.Context[Any] = zmq.Context()
wire = Wire(context, address)
if what == "unfinished":
    wire.ask(Hello(ARENA_BYTES, ARENA_BYTES, DEFAULT_MAX_MESSAGE_BYTES))
    segment = Segment.create(segment_layout(ARENA_BYTES))
    wire.send(Attach(segment.name))
    time.sleep(0.2)
else:
    one = Impostor(wire, channel)  # type: ignore[arg-type]
    one.assert_served()
    if what == "too long":
        one.wire.send(bytes(DEFAULT_MAX_MESSAGE_BYTES + 1))
    elif what == "half a record":
        position = one.forger.cell(PUBLISHED)
        one.forger.set_length(position, 1000)
        one.forger.set_cell(PUBLISHED, position + 1008)
print("ready", flush=True)
time.sleep(60)
