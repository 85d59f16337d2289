"""Random tensors for the soak, and the right reply to each: the same bytes, each with some bits flipped."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch

from shmtransport.memory.dtypes import TABLE

_FLIPPED = 0x5A
_POOL = np.random.default_rng(0).integers(0, 256, 8 << 20, dtype=np.uint8)


def as_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a contiguous tensor, whatever its dtype."""
    array: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array


def random_shape(chance: random.Random, itemsize: int) -> tuple[int, ...]:
    """From nothing to some MiB, small ones more often, of 0 to 4 dimensions."""
    elements = int(2 ** chance.uniform(0, 21)) // itemsize
    kind = chance.randrange(8)
    if kind == 0:
        return ()
    if kind == 1:
        return (chance.randrange(4), 0, 3)
    if kind == 2 and elements > 12:
        return (2, 3, elements // 6)
    return (elements,)


def fill(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """Write random bytes into a tensor; bools get 0 and 1."""
    if tensor.numel():
        nbytes = tensor.nbytes
        start = chance.randrange(len(_POOL) - nbytes)
        source = _POOL[start : start + nbytes]
        as_bytes(tensor)[:] = source & 1 if tensor.dtype is torch.bool else source
    return tensor


def random_row(chance: random.Random) -> torch.dtype:
    return chance.choice(TABLE).torch


def reply_to(tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What the server answers, written into ``out``."""
    if tensor.numel():
        np.bitwise_xor(as_bytes(tensor.contiguous()), 1 if tensor.dtype is torch.bool else _FLIPPED, out=as_bytes(out))
    return out


def is_reply_to(tensor: torch.Tensor, reply: Any) -> bool:
    """Whether a reply is right in kind, shape and every byte."""
    if not isinstance(reply, torch.Tensor) or reply.dtype != tensor.dtype or reply.shape != tensor.shape:
        return False
    if math.prod(tensor.shape) == 0:
        return True
    expected = as_bytes(tensor.contiguous()) ^ np.uint8(1 if tensor.dtype is torch.bool else _FLIPPED)
    return bool(np.array_equal(as_bytes(reply.contiguous()), expected))
