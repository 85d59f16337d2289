"""Messages and the values in them."""

from __future__ import annotations

import warnings
from random import Random

import msgspec
import numpy as np
import torch

from shmtransport.memory.dtypes import TABLE
from shmtransport.protocol.messages import (
    PREAMBLE,
    Reply,
    decode,
)
from shmtransport.protocol.values import unpack

from .. import mutations
from ..rule import Target
from .outcomes import check_extensions, check_message, check_value
from .samples import ENCODED, REFUSALS, RICH, with_tensors

with warnings.catch_warnings():  # torch says once that complex32 is experimental
    warnings.simplefilter("ignore")
    torch.empty(0, dtype=torch.complex32)


class Decoding(Target):
    """``message.decode``."""

    name = "decode"

    def generate(self, random: Random) -> bytes:
        kind = random.random()
        if kind < 0.65:
            return mutations.mutate(random, ENCODED)
        if kind < 0.7:  # of another version: only a refusal among them can be read
            data = mutations.mutate(random, (*ENCODED, *REFUSALS))
            return data[:1] + bytes((random.randrange(256),)) + data[2:]
        if kind < 0.98:
            return mutations.message(random)
        return random.choice((b"", PREAMBLE)) + random.randbytes(random.randrange(60))

    def check(self, data: bytes) -> None:
        check_message(decode(data))


class Unpacking(Target):
    """``message.unpack`` of the result in a reply that carries one tensor of each dtype."""

    name = "unpack"

    def __init__(self) -> None:
        self._tensors = [torch.empty((2,), dtype=row.torch) for row in TABLE]
        values = (RICH, [torch.ones(1)] * len(TABLE), [np.ones(1)] * len(TABLE), {"a": ((1,), [2])}, [[[0]]], None)
        self._valid = tuple(msgspec.msgpack.encode(with_tensors(value)) for value in values)

    def generate(self, random: Random) -> bytes:
        if random.random() < 0.4:
            return mutations.mutate(random, self._valid)
        return mutations.value(random, len(TABLE) + (random.random() < 0.1))

    def check(self, data: bytes) -> None:
        message = decode(PREAMBLE + b"\x94\x07\x00" + data + b"\x90")
        assert isinstance(message, Reply)
        check_value(unpack(message.result, self._tensors), snapshot=False)
        check_extensions(message.result, len(self._tensors))
