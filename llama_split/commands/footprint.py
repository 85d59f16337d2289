"""Computes what a split costs from a model's outline: calls and bytes of a forward, memory of each side.

Its lists of weights are those that the sides load.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ..boundary.choices import default_arena_bytes
from ..boundary.operations import REVEALED, Dtype, Mode
from ..boundary.traffic import Traffic, forward_sizes, forward_traffic
from ..checkpoint.outline import Outline, parameter_shape, trusted_names


@dataclass(frozen=True)
class Footprint:
    """One model in one mode; all sizes are in bytes.

    Attributes:
        mode: the split.
        prefill: traffic of a prompt's forward, of which the last token's logits are wanted.
        decode: traffic of the forward of one more token.
        worker_sees: what the split reveals to the worker.
        trusted_weights: weights held by the trusted side.
        worker_weights: weights held by the worker.
        kv_per_token: KV per token, held by ``kv_holder``.
        arena: the arena of each direction; each side holds its own.
    """

    mode: Mode
    prefill: Traffic
    decode: Traffic
    worker_sees: str
    trusted_weights: int
    worker_weights: int
    kv_per_token: int
    arena: int

    @property
    def kv_holder(self) -> str:
        """The side that holds the KV cache: ``trusted`` or ``worker``."""
        return "worker" if self.mode.worker_keeps_kv else "trusted"


def footprint(outline: Outline, mode: Mode, compute: Dtype, wire: Dtype, prefill_tokens: int) -> Footprint:
    """The cost of a model in one mode.

    Args:
        outline: the model's parameters.
        mode: the split.
        compute: the dtype that both sides compute in.
        wire: the dtype of activations that cross.
        prefill_tokens: tokens of the prompt.
    """
    geometry = outline.geometry

    def nbytes(names: Iterable[str]) -> int:
        return sum(prod(parameter_shape(geometry, name)) for name in names) * compute.itemsize

    groups = outline.worker_groups(embedding=mode is Mode.OP)
    return Footprint(
        mode=mode,
        prefill=forward_traffic(mode, geometry, forward_sizes(geometry, prefill_tokens), wire),
        decode=forward_traffic(mode, geometry, forward_sizes(geometry, 1, cached=prefill_tokens), wire),
        worker_sees=REVEALED[mode],
        trusted_weights=nbytes(trusted_names(geometry.layers, mode)),
        worker_weights=nbytes(name for group in groups.values() for name in group),
        kv_per_token=2 * geometry.layers * geometry.kv_width * compute.itemsize,
        arena=default_arena_bytes(geometry, mode, wire),
    )
