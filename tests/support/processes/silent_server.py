"""A server that stops in mid-handshake: ``silent_server.py ADDRESS WHEN``; prints "ready", and "heard" what it had.

WHEN is the message after which it does nothing more: "Hello" or "Attach".
"""

from __future__ import annotations

import sys
import time

import zmq

from shmtransport.protocol.messages import Hello, Offer, decode, encode

router = zmq.Context().socket(zmq.ROUTER)
router.bind(sys.argv[1])
print("ready", flush=True)
while True:
    identity, data = router.recv_multipart()
    message = decode(data)
    if type(message).__name__ == sys.argv[2]:
        print("heard", sys.argv[2], flush=True)
        time.sleep(60)
    elif isinstance(message, Hello):
        router.send_multipart([identity, encode(Offer(message.max_message_bytes))])
