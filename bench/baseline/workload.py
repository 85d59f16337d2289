"""The calls of one forward of Llama-3.2-1B over a prompt of 1024 tokens: what each sends and what comes back.

There are four patterns. ``op`` is the original system's: six calls a layer, with keys and values already repeated for
all heads. ``fused``, ``layer`` and ``stack`` are llama_split's other modes, which need fewer calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LAYERS = 16
TOKENS = 1024
HIDDEN = 2048
HEADS = 32
KV_HEADS = 8
HEAD_DIM = 64
INTERMEDIATE = 8192
VOCABULARY = 128256

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """The shapes of a call's arguments and of its result; with ``ids`` the argument is int64 token ids."""

    name: str
    arguments: tuple[Shape, ...]
    result: Shape
    ids: bool = False

    def sent_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the arguments, if activations have this dtype."""
        itemsize = torch.int64.itemsize if self.ids else dtype.itemsize
        return sum(math.prod(shape) for shape in self.arguments) * itemsize

    def received_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the result, if activations have this dtype."""
        return math.prod(self.result) * dtype.itemsize


_TOKENS_HIDDEN: Shape = (1, TOKENS, HIDDEN)
_PER_HEAD: Shape = (1, HEADS, TOKENS, HEAD_DIM)
_SCORES: Shape = (1, HEADS, TOKENS, TOKENS)
_QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM

EMBEDDING = Operation("embedding", ((1, TOKENS),), _TOKENS_HIDDEN, ids=True)
QKV = Operation("qkv", (_TOKENS_HIDDEN,), (1, TOKENS, _QKV_WIDTH))
SCORES = Operation("scores", (_PER_HEAD, _PER_HEAD), _SCORES)
MIX = Operation("mix", (_SCORES, _PER_HEAD), _PER_HEAD)
OUTPUT = Operation("output", (_TOKENS_HIDDEN,), _TOKENS_HIDDEN)
GATE_UP = Operation("gate_up", (_TOKENS_HIDDEN,), (1, TOKENS, 2 * INTERMEDIATE))
DOWN = Operation("down", ((1, TOKENS, INTERMEDIATE),), _TOKENS_HIDDEN)
LM_HEAD = Operation("lm_head", ((1, 1, HIDDEN),), (1, 1, VOCABULARY))
LAYER = Operation("layer", (_TOKENS_HIDDEN,), _TOKENS_HIDDEN)
STACK = Operation("stack", (_TOKENS_HIDDEN,), (1, 1, VOCABULARY))

PATTERNS: dict[str, tuple[Operation, ...]] = {
    "op": (EMBEDDING, *(QKV, SCORES, MIX, OUTPUT, GATE_UP, DOWN) * LAYERS, LM_HEAD),
    "fused": (*(QKV, OUTPUT, GATE_UP, DOWN) * LAYERS, LM_HEAD),
    "layer": (*(LAYER,) * LAYERS, LM_HEAD),
    "stack": (STACK,),
}
"""The calls of a forward, in order."""

OPERATIONS: tuple[Operation, ...] = tuple(dict.fromkeys(one for pattern in PATTERNS.values() for one in pattern))
"""Each operation once; a call names its operation by the index into this tuple."""


def sent_bytes(pattern: str, dtype: torch.dtype) -> int:
    """Bytes that a forward of this pattern sends."""
    return sum(one.sent_bytes(dtype) for one in PATTERNS[pattern])


def received_bytes(pattern: str, dtype: torch.dtype) -> int:
    """Bytes that a forward of this pattern receives."""
    return sum(one.received_bytes(dtype) for one in PATTERNS[pattern])
