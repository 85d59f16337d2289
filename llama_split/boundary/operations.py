"""The boundary: every operation that the trusted side can ask of the worker, and the shapes that cross.

Both sides, ``llama-split info`` and the tests that compare documents and count bytes read this one description. A
dimension is written as a letter: B batch, T tokens of this forward, S tokens attended to (cached ones and these),
N tokens whose logits are asked for, H heads (all of them, or some where an operation is split into several calls),
d head_dim, D hidden, Q query width (heads × head_dim), K key/value width (kv_heads × head_dim), I intermediate width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from .geometry import Geometry

if TYPE_CHECKING:
    import torch

_INTEGER_BYTES = 8  # int64


class Dtype(Protocol):
    """What counting bytes needs of a dtype: torch's have it, and so have those of ``choices``."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""


class Mode(str, Enum):
    """Where the model is split; ``REVEALED`` tells what each split reveals to the worker."""

    OP = "op"
    FUSED = "fused"
    LAYER = "layer"
    STACK = "stack"

    @property
    def worker_keeps_kv(self) -> bool:
        """True if the worker attends, and so keeps the KV cache."""
        return self in (Mode.LAYER, Mode.STACK)


_TEXT = "so the prompt and the generated text"
REVEALED: dict[Mode, str] = {
    Mode.OP: f"everything: token ids, queries, keys, values, attention weights, and logits, {_TEXT}",
    Mode.FUSED: f"the inputs and outputs of all linear layers: queries, keys, values and logits, {_TEXT}",
    Mode.LAYER: f"all hidden states, positions, keys and values, and logits, {_TEXT}",
    Mode.STACK: f"all hidden states, positions, keys and values, and logits, {_TEXT}",
}
"""What each split reveals to the worker, in the words of the documents and ``llama-split info``.

Every split reveals the prompt: layer 0 gets the normalised embeddings, and the nearest row of the embedding matrix
identifies each token.
"""

REVEALED_UNDER_MASKS = "how many tokens there are, and when; all else is uniform numbers, whatever the text"
"""What the worker sees under the shield ``otp``, in place of what the mode reveals."""

PROMISES: dict[str, str] = {
    "verify": "in op and fused: a row that is wrong by r times what rounding explains is accepted with a probability "
    "of at most 1.6/r; hides nothing",
    "otp": f"in fused: the worker sees {REVEALED_UNDER_MASKS}; any wrong row is accepted with a probability below 2⁻³⁹",
}
"""What each shield promises against a worker that does anything, in the words of the documents and ``info``."""


@dataclass(frozen=True)
class TensorSpec:
    """Describes a tensor that crosses: the letters of its dimensions, and whether it holds int64 or activations."""

    dims: tuple[str, ...]
    integers: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape for these sizes of the dimensions."""
        return tuple(sizes[dim] for dim in self.dims)

    def nbytes(self, sizes: Mapping[str, int], wire: Dtype) -> int:
        """The tensor's size in bytes, if activations are of dtype ``wire``."""
        return prod(self.shape(sizes)) * (_INTEGER_BYTES if self.integers else wire.itemsize)


def _tensor(dims: str) -> TensorSpec:
    return TensorSpec(tuple(dims.split()))


def _integers(dims: str) -> TensorSpec:
    return TensorSpec(tuple(dims.split()), integers=True)


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of the worker: its wire name, its arguments and its result.

    ``per_layer`` is true if a forward runs it once for each layer, ``is_linear`` if the result is linear in the first
    argument, but for a bias. Each of them exists once.
    """

    name: str
    arguments: tuple[TensorSpec, ...]
    result: TensorSpec
    per_layer: bool = True
    is_linear: bool = False

    def bind(self, arguments: Sequence[torch.Tensor], geometry: Geometry, **known: int) -> Mapping[str, int]:
        """Find the size of every dimension from the shapes of the arguments.

        Args:
            arguments: the operation's tensors.
            geometry: the model's sizes.
            known: sizes that no argument has, by letter.

        Raises:
            ValueError: a shape does not fit the model, or the arguments don't fit each other.
        """
        return sizes_of(self, tuple([argument.shape for argument in arguments]), geometry, tuple(known.items()))


@lru_cache(maxsize=4096)  # both sides ask for the same few shapes with every token
def sizes_of(
    operation: Operation,
    shapes: tuple[tuple[int, ...], ...],
    geometry: Geometry,
    known: tuple[tuple[str, int], ...] = (),
) -> Mapping[str, int]:
    """What ``Operation.bind`` returns, and raises, for arguments of these shapes."""
    if len(shapes) != len(operation.arguments):
        raise ValueError(f"{operation.name} takes {len(operation.arguments)} tensors, not {len(shapes)}")
    fixed = geometry.widths
    sizes = {**fixed, **dict(known)}
    for found, described in zip(shapes, operation.arguments, strict=True):
        fits = len(found) == len(described.dims) and all(
            sizes.setdefault(dim, size) == size for dim, size in zip(described.dims, found, strict=True)
        )
        if not fits:
            wanted = ", ".join(str(fixed.get(dim, dim)) for dim in described.dims)
            raise ValueError(f"{operation.name} takes [{wanted}], not {list(found)}")
    return MappingProxyType(sizes)


EMBED = Operation("embed", (_integers("B T"),), _tensor("B T D"), per_layer=False)
"""Rows of the embedding for token ids."""

QKV = Operation("qkv", (_tensor("B T D"),), _tensor("B T Q+2K"), is_linear=True)
"""The three attention projections in one product; the result is query, key, value side by side."""

SCORES = Operation("scores", (_tensor("B H T d"), _tensor("B H S d")), _tensor("B H T S"), is_linear=True)
"""Q·Kᵀ, neither scaled nor masked. The trusted side repeats the keys for all query heads before it sends them."""

MIX = Operation("mix", (_tensor("B H T S"), _tensor("B H S d")), _tensor("B H T d"), is_linear=True)
"""Attention weights times values. The trusted side repeats the values for all query heads before it sends them."""

OUT_PROJ = Operation("o", (_tensor("B T Q"),), _tensor("B T D"), is_linear=True)
"""The output projection of attention."""

GATE_UP = Operation("gate_up", (_tensor("B T D"),), _tensor("B T 2I"), is_linear=True)
"""Both input projections of the MLP in one product; the result is gate, up side by side."""

DOWN = Operation("down", (_tensor("B T I"),), _tensor("B T D"), is_linear=True)
"""The output projection of the MLP."""

LM_HEAD = Operation("lm_head", (_tensor("B N D"),), _tensor("B N V"), per_layer=False, is_linear=True)
"""Logits of the tokens that are asked for."""

LAYER = Operation("layer", (_tensor("B T D"),), _tensor("B T D"))
"""A whole decoder layer, including attention over the worker's KV cache."""

STACK = Operation("stack", (_tensor("B T D"),), _tensor("B N V"), per_layer=False)
"""All decoder layers, including attention over the worker's KV cache, final norm, and logits of the last N tokens.

Where several workers share the layers, those that the last worker holds.
"""

LAYERS = Operation("layers", (_tensor("B T D"),), _tensor("B T D"), per_layer=False)
"""In mode stack, all decoder layers of a worker that is not the last of several, including attention."""

POSITIONS = _integers("B T")
"""Crosses with the first call of a forward where the worker attends."""

LINEARS: tuple[Operation, ...] = (QKV, OUT_PROJ, GATE_UP, DOWN, LM_HEAD)
OPERATIONS: tuple[Operation, ...] = (EMBED, QKV, SCORES, MIX, OUT_PROJ, GATE_UP, DOWN, LM_HEAD, LAYER, LAYERS, STACK)
BY_MODE: dict[Mode, tuple[Operation, ...]] = {
    Mode.OP: (EMBED, QKV, SCORES, MIX, OUT_PROJ, GATE_UP, DOWN, LM_HEAD),
    Mode.FUSED: (QKV, OUT_PROJ, GATE_UP, DOWN, LM_HEAD),
    Mode.LAYER: (LAYER, LM_HEAD),
    Mode.STACK: (STACK,),
}
