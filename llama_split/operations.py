"""The boundary: every operation that the trusted side asks of the worker, and the shapes that cross.

Both sides, the documentation's table and the tests that count bytes read this one description. Shapes use
B batch, T tokens of this forward, D hidden, Q query width (heads × head_dim), K key/value width (kv_heads × head_dim),
I intermediate width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from transformers import LlamaConfig


class Mode(str, Enum):
    """Where the model is cut; see ``REVEALED`` for what each shows the worker."""

    FUSED = "fused"
    LAYER = "layer"
    STACK = "stack"

    @property
    def worker_keeps_kv(self) -> bool:
        """Whether attention, and so the KV cache, is the worker's."""
        return self is not Mode.FUSED


REVEALED: dict[Mode, str] = {
    Mode.FUSED: "the inputs and outputs of all linear layers: queries, keys, values and logits, so the generated text",
    Mode.LAYER: "all hidden states, positions, keys and values, and logits, so the generated text",
    Mode.STACK: "all hidden states, positions, keys and values, and logits, so the generated text",
}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Llama that decide every shape."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Geometry:
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Operation:
    """One remote operation: a tensor [B, T, input_width] goes out, one [B, T, output_width] comes back.

    Of an operation that is not ``per_token_out`` only the results of the positions whose logits are asked for come
    back; of one that is not ``per_token_in`` only these are sent.
    """

    name: str
    input_width: Callable[[Geometry], int]
    output_width: Callable[[Geometry], int]
    per_layer: bool = True
    per_token_in: bool = True
    per_token_out: bool = True


QKV = Operation("qkv", lambda g: g.hidden, lambda g: g.query_width + 2 * g.kv_width)
"""The three attention projections in one product; the result is query, key, value side by side."""

O = Operation("o", lambda g: g.query_width, lambda g: g.hidden)  # noqa: E741 - the projection's own name
"""The attention's output projection."""

GATE_UP = Operation("gate_up", lambda g: g.hidden, lambda g: 2 * g.intermediate)
"""Both input projections of the MLP in one product; the result is gate, up side by side."""

DOWN = Operation("down", lambda g: g.intermediate, lambda g: g.hidden)
"""The MLP's output projection."""

LM_HEAD = Operation(
    "lm_head", lambda g: g.hidden, lambda g: g.vocab, per_layer=False, per_token_in=False, per_token_out=False
)
"""Logits of the positions that are asked for."""

LAYER = Operation("layer", lambda g: g.hidden, lambda g: g.hidden)
"""A whole decoder layer, attention over the worker's KV cache included."""

STACK = Operation("stack", lambda g: g.hidden, lambda g: g.vocab, per_layer=False, per_token_out=False)
"""All decoder layers, attention over the worker's KV cache included, the final norm, and the logits."""

LINEARS: tuple[Operation, ...] = (QKV, O, GATE_UP, DOWN, LM_HEAD)
BY_MODE: dict[Mode, tuple[Operation, ...]] = {
    Mode.FUSED: (QKV, O, GATE_UP, DOWN, LM_HEAD),
    Mode.LAYER: (LAYER, LM_HEAD),
    Mode.STACK: (STACK,),
}


def calls_per_forward(mode: Mode, geometry: Geometry) -> int:
    """How many calls one forward makes: 4 L + 1 for ``fused``, L + 1 for ``layer``, 1 for ``stack``."""
    return sum(geometry.layers if operation.per_layer else 1 for operation in BY_MODE[mode])


def widest(mode: Mode, geometry: Geometry) -> int:
    """Elements a token of the widest tensor that crosses for every token (logits are asked for a few only)."""
    sent = [op.input_width(geometry) for op in BY_MODE[mode] if op.per_token_in]
    received = [op.output_width(geometry) for op in BY_MODE[mode] if op.per_token_out]
    return max(sent + received)
