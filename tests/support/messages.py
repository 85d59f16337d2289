"""One message of each kind, and plain values sent through a message."""

from __future__ import annotations

import math
from typing import Any

from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.messages import (
    Attach,
    Cancel,
    Failure,
    Goodbye,
    Hello,
    Message,
    More,
    Offer,
    OneWayRequest,
    Part,
    Refused,
    Reply,
    Request,
    StreamRequest,
    Welcome,
    decode,
    encode,
)
from shmtransport.protocol.values import pack, unpack

DESCRIPTOR = TensorDescriptor(64, (2, 3), "float32", 5, 9)
MESSAGES: list[Message] = [
    Hello(1 << 30, 0, 65536),
    Refused("too many clients"),
    Offer(65536),
    Attach("/shmtransport-" + "0" * 32),
    Welcome("/shmtransport-" + "f" * 32),
    Goodbye(""),
    Request(0, "linear", [1, "a", None], {"layer": 3}, (DESCRIPTOR,)),
    Reply(2**63 - 1, [True, 1.5, b"x"], (DESCRIPTOR, DESCRIPTOR)),
    Failure(7, "handler", "ValueError", "no such layer: é"),
    Failure(8, "handler", "ValueError", "", "Traceback (most recent call last):\n…"),
    OneWayRequest(1, "log", ["é", 1], {"at": 2.5}, (DESCRIPTOR,)),
    StreamRequest(2, "tokens", [[1, 2]], {}, (DESCRIPTOR,), 8),
    Part(2, {"token": 17}, (DESCRIPTOR,)),
    More(2, 1024),
    Cancel(2**63 - 1),
]


def no_tensors(_tensor: object) -> int:
    raise AssertionError("there is no tensor in this value")


def through(value: Any) -> Any:
    """A plain value packed, encoded, decoded and unpacked."""
    received = decode(encode(Reply(0, pack(value, no_tensors), ()), 1 << 30))
    assert isinstance(received, Reply)
    return unpack(received.result, [])


def same(left: Any, right: Any) -> bool:
    """Equal in value and type at every level; NaN equals NaN and -0.0 doesn't equal 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    return bool(left == right)
