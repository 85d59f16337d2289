"""The boundary: every operation that the trusted side asks of the worker, and the shapes that cross.

Both sides, the documents' tables, ``llama-split info`` and the tests that count bytes read this one description. A
dimension is written as a letter: B batch, T tokens of this forward, S tokens attended to (cached ones and these),
N tokens whose logits are asked for, H heads (all of them, or some where a call is cut), d head_dim, D hidden,
Q query width (heads × head_dim), K key/value width (kv_heads × head_dim), I intermediate width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from transformers import LlamaConfig


class Mode(str, Enum):
    """Where the model is cut; see ``REVEALED`` for what each shows the worker."""

    OP = "op"
    FUSED = "fused"
    LAYER = "layer"
    STACK = "stack"

    @property
    def worker_keeps_kv(self) -> bool:
        """Whether attention, and so the KV cache, is the worker's."""
        return self in (Mode.LAYER, Mode.STACK)


_TEXT = "so the prompt and the generated text"
REVEALED: dict[Mode, str] = {
    Mode.OP: f"everything: token ids, queries, keys, values, attention weights, and logits, {_TEXT}",
    Mode.FUSED: f"the inputs and outputs of all linear layers: queries, keys, values and logits, {_TEXT}",
    Mode.LAYER: f"all hidden states, positions, keys and values, and logits, {_TEXT}",
    Mode.STACK: f"all hidden states, positions, keys and values, and logits, {_TEXT}",
}
"""What each split shows the worker, in the words that the documents and ``llama-split info`` use.

The prompt is among it everywhere: layer 0 gets the normalised embeddings, and the nearest row of the embedding's matrix
names each token.
"""


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

    @property
    def widths(self) -> dict[str, int]:
        """The dimensions that the model fixes, by their letters."""
        return {
            "d": self.head_dim,
            "D": self.hidden,
            "Q": self.query_width,
            "Q+2K": self.query_width + 2 * self.kv_width,
            "I": self.intermediate,
            "2I": 2 * self.intermediate,
            "V": self.vocab,
        }


@dataclass(frozen=True)
class Tensor:
    """One tensor that crosses: its dimensions' letters, and whether it holds integers (int64) or activations."""

    dims: tuple[str, ...]
    integers: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that these sizes give it."""
        return tuple(sizes[dim] for dim in self.dims)

    def nbytes(self, sizes: Mapping[str, int], wire: torch.dtype) -> int:
        """Bytes that it takes, where activations are of dtype ``wire``."""
        return torch.Size(self.shape(sizes)).numel() * (torch.int64 if self.integers else wire).itemsize


def _tensor(dims: str) -> Tensor:
    return Tensor(tuple(dims.split()))


def _integers(dims: str) -> Tensor:
    return Tensor(tuple(dims.split()), integers=True)


@dataclass(frozen=True)
class Operation:
    """One remote operation: which tensors are its arguments, and which one it gives back."""

    name: str
    arguments: tuple[Tensor, ...]
    result: Tensor
    per_layer: bool = True

    def bind(self, arguments: Sequence[torch.Tensor], geometry: Geometry, **known: int) -> dict[str, int]:
        """The size of every dimension, from the arguments' shapes; ``known`` are those that no argument shows.

        Raises:
            ValueError: a shape does not fit the model, or the arguments don't fit each other.
        """
        if len(arguments) != len(self.arguments):
            raise ValueError(f"{self.name} takes {len(self.arguments)} tensors, not {len(arguments)}")
        fixed = geometry.widths
        sizes = {**fixed, **known}
        for argument, described in zip(arguments, self.arguments, strict=True):
            found = tuple(argument.shape)
            fits = len(found) == len(described.dims) and all(
                sizes.setdefault(dim, size) == size for dim, size in zip(described.dims, found, strict=True)
            )
            if not fits:
                wanted = ", ".join(str(fixed.get(dim, dim)) for dim in described.dims)
                raise ValueError(f"{self.name} takes [{wanted}], not {list(found)}")
        return sizes


EMBED = Operation("embed", (_integers("B T"),), _tensor("B T D"), per_layer=False)
"""Rows of the embedding, by token id."""

QKV = Operation("qkv", (_tensor("B T D"),), _tensor("B T Q+2K"))
"""The three attention projections in one product; the result is query, key, value side by side."""

SCORES = Operation("scores", (_tensor("B H T d"), _tensor("B H S d")), _tensor("B H T S"))
"""Q·Kᵀ, neither scaled nor masked; keys are repeated to all query heads before they are sent."""

MIX = Operation("mix", (_tensor("B H T S"), _tensor("B H S d")), _tensor("B H T d"))
"""Attention weights times values, these repeated to all query heads before they are sent."""

O = Operation("o", (_tensor("B T Q"),), _tensor("B T D"))  # noqa: E741 - the projection's own name
"""The attention's output projection."""

GATE_UP = Operation("gate_up", (_tensor("B T D"),), _tensor("B T 2I"))
"""Both input projections of the MLP in one product; the result is gate, up side by side."""

DOWN = Operation("down", (_tensor("B T I"),), _tensor("B T D"))
"""The MLP's output projection."""

LM_HEAD = Operation("lm_head", (_tensor("B N D"),), _tensor("B N V"), per_layer=False)
"""Logits of the positions that are asked for."""

LAYER = Operation("layer", (_tensor("B T D"),), _tensor("B T D"))
"""A whole decoder layer, attention over the worker's KV cache included."""

STACK = Operation("stack", (_tensor("B T D"),), _tensor("B N V"), per_layer=False)
"""All decoder layers, attention over the worker's KV cache included, the final norm, and the last N tokens' logits."""

POSITIONS = _integers("B T")
"""Goes along with the first call of a forward where the worker attends."""

LINEARS: tuple[Operation, ...] = (QKV, O, GATE_UP, DOWN, LM_HEAD)
OPERATIONS: tuple[Operation, ...] = (EMBED, QKV, SCORES, MIX, O, GATE_UP, DOWN, LM_HEAD, LAYER, STACK)
BY_MODE: dict[Mode, tuple[Operation, ...]] = {
    Mode.OP: (EMBED, QKV, SCORES, MIX, O, GATE_UP, DOWN, LM_HEAD),
    Mode.FUSED: (QKV, O, GATE_UP, DOWN, LM_HEAD),
    Mode.LAYER: (LAYER, LM_HEAD),
    Mode.STACK: (STACK,),
}


def calls_per_forward(mode: Mode, geometry: Geometry) -> int:
    """How many calls one forward makes: 6 L + 2 for ``op``, 4 L + 1 ``fused``, L + 1 ``layer``, 1 ``stack``."""
    return sum(geometry.layers if operation.per_layer else 1 for operation in BY_MODE[mode])


def forward_sizes(
    geometry: Geometry, tokens: int, *, cached: int = 0, batch: int = 1, logits: int = 1
) -> dict[str, int]:
    """The size of every dimension in a forward of ``tokens`` tokens after ``cached`` ones, a row.

    ``logits`` is how many tokens' logits are asked for, a row.
    """
    free = {"B": batch, "T": tokens, "S": cached + tokens, "N": logits, "H": geometry.heads}
    return {**geometry.widths, **free}


@dataclass(frozen=True)
class Traffic:
    """What one forward takes: calls, and bytes of the tensors that cross."""

    calls: int
    sent: int
    received: int


def forward_traffic(mode: Mode, geometry: Geometry, sizes: Mapping[str, int], wire: torch.dtype) -> Traffic:
    """What one forward of these sizes takes, if no call is cut; a mask for padding is not counted."""

    def total(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.nbytes(sizes, wire) for tensor in tensors)

    sent = total([POSITIONS]) if mode.worker_keeps_kv else 0
    received = 0
    for operation in BY_MODE[mode]:
        times = geometry.layers if operation.per_layer else 1
        sent += times * total(operation.arguments)
        received += times * total([operation.result])
    return Traffic(calls_per_forward(mode, geometry), sent, received)
