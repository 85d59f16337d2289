"""The calls of one forward of Llama-3.2-1B over a prompt of 1024 tokens, as plain data: what is sent, what comes back.

Four patterns: ``op`` is the original system's, six calls a layer with the keys and values already repeated for all
heads; ``fused``, ``layer`` and ``stack`` are the splits of llama_split that ask for less.
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
class Kind:
    """A kind of call: the shapes of its arguments and of its result. ``ids``: the argument is int64 token ids."""

    method: str
    arguments: tuple[Shape, ...]
    result: Shape
    ids: bool = False

    def sent_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the arguments, where activations are of ``dtype``."""
        itemsize = torch.int64.itemsize if self.ids else dtype.itemsize
        return sum(math.prod(shape) for shape in self.arguments) * itemsize

    def received_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the result."""
        return math.prod(self.result) * dtype.itemsize


_TOKENS_HIDDEN: Shape = (1, TOKENS, HIDDEN)
_PER_HEAD: Shape = (1, HEADS, TOKENS, HEAD_DIM)
_SCORES: Shape = (1, HEADS, TOKENS, TOKENS)
_QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM

EMBEDDING = Kind("embedding", ((1, TOKENS),), _TOKENS_HIDDEN, ids=True)
QKV = Kind("qkv", (_TOKENS_HIDDEN,), (1, TOKENS, _QKV_WIDTH))
SCORES = Kind("scores", (_PER_HEAD, _PER_HEAD), _SCORES)
MIX = Kind("mix", (_SCORES, _PER_HEAD), _PER_HEAD)
OUTPUT = Kind("output", (_TOKENS_HIDDEN,), _TOKENS_HIDDEN)
GATE_UP = Kind("gate_up", (_TOKENS_HIDDEN,), (1, TOKENS, 2 * INTERMEDIATE))
DOWN = Kind("down", ((1, TOKENS, INTERMEDIATE),), _TOKENS_HIDDEN)
LM_HEAD = Kind("lm_head", ((1, 1, HIDDEN),), (1, 1, VOCABULARY))
LAYER = Kind("layer", (_TOKENS_HIDDEN,), _TOKENS_HIDDEN)
STACK = Kind("stack", (_TOKENS_HIDDEN,), (1, 1, VOCABULARY))

PATTERNS: dict[str, tuple[Kind, ...]] = {
    "op": (EMBEDDING, *(QKV, SCORES, MIX, OUTPUT, GATE_UP, DOWN) * LAYERS, LM_HEAD),
    "fused": (*(QKV, OUTPUT, GATE_UP, DOWN) * LAYERS, LM_HEAD),
    "layer": (*(LAYER,) * LAYERS, LM_HEAD),
    "stack": (STACK,),
}
"""All calls of a forward, in order."""

KINDS: tuple[Kind, ...] = tuple(dict.fromkeys(kind for pattern in PATTERNS.values() for kind in pattern))
"""Each kind once: what both sides know a call by is its place here."""


def sent_bytes(pattern: str, dtype: torch.dtype) -> int:
    """Bytes that a forward sends."""
    return sum(kind.sent_bytes(dtype) for kind in PATTERNS[pattern])


def received_bytes(pattern: str, dtype: torch.dtype) -> int:
    """Bytes that a forward receives."""
    return sum(kind.received_bytes(dtype) for kind in PATTERNS[pattern])
