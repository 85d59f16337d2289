"""Valid messages and values, from which hostile ones are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.messages import (
    MAX_TENSORS,
    Cancel,
    Failure,
    Goodbye,
    More,
    OneWayRequest,
    Part,
    Refused,
    Reply,
    Request,
    StreamRequest,
    encode,
)
from shmtransport.protocol.values import pack
from tests.support.messages import MESSAGES


def _descriptor(sequence: int, dtype: str = "float32") -> TensorDescriptor:
    return TensorDescriptor(64 * sequence, (2, 3), dtype, sequence, sequence)


def with_tensors(value: Any) -> Any:
    """A packed value; its tensors get the indices from 0 on."""
    indices = iter(range(MAX_TENSORS))
    return pack(value, lambda _tensor: next(indices))


RICH = [torch.ones(1), (1, 2.5, "text", b"bytes"), {"k": [None, {7: True}]}, np.ones(1)]
_REQUESTS = (
    Request(0, "linear", [1, "a", None], {"layer": 3}, (_descriptor(1),)),
    Request(1, "m", with_tensors(RICH), {"keyword": (1, [2])}, (_descriptor(1), _descriptor(2))),
    Request(2, "m", with_tensors([torch.ones(1)] * 4), {}, tuple(_descriptor(1 + n) for n in range(4))),
    OneWayRequest(3, "log", with_tensors(RICH), {"keyword": (1, [2])}, (_descriptor(1), _descriptor(2))),
    StreamRequest(4, "tokens", with_tensors([torch.ones(1)]), {}, (_descriptor(1),), 8),
    More(4, 4),
    Cancel(4),
)
_REPLIES = (
    Reply(0, with_tensors(torch.ones(1)), (_descriptor(1),)),
    Reply(1, with_tensors(RICH), (_descriptor(1), _descriptor(2))),
    Reply(2, with_tensors((torch.ones(1), np.ones(1))), (_descriptor(3), _descriptor(4))),
    Reply(0, None, ()),
    Reply(9, None, (_descriptor(4),)),
    Failure(1, "handler", "ValueError", "no such layer: é"),
    Failure(2, "ArenaFull", "ArenaFull", "requested 1 MiB"),
    Part(3, with_tensors(torch.ones(1)), (_descriptor(1),)),
    Part(3, None, ()),
)
ENCODED = tuple(encode(message) for message in (*MESSAGES, *_REQUESTS, *_REPLIES))
REFUSALS = tuple(map(encode, (Refused("too many clients"), Refused(""), Refused("é"), Refused("x" * 4096))))
ENCODED_REQUESTS = (*map(encode, _REQUESTS), *map(encode, _REQUESTS), encode(Goodbye("done")))
ENCODED_REPLIES = (*map(encode, _REPLIES), encode(Goodbye("done")))
