"""Computes what a split costs from a model's outline: calls and bytes of a forward, memory of each side.

Its lists of weights are those that the sides load.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from ..boundary.choices import default_arena_bytes
from ..boundary.division import divide
from ..boundary.operations import REVEALED, Dtype, Mode
from ..boundary.traffic import Traffic, forward_sizes, forward_traffic
from ..checkpoint.outline import Outline, parameter_shape, trusted_names


@dataclass(frozen=True)
class Share:
    """What one worker holds: its layers, and the bytes of their weights and of what comes with them."""

    layers: range
    weights: int


@dataclass(frozen=True)
class Footprint:
    """One model in one mode; all sizes are in bytes.

    Attributes:
        mode: the split.
        prefill: traffic of a prompt's forward, of which the last token's logits are wanted.
        decode: traffic of the forward of one more token.
        worker_sees: what the split reveals to the worker.
        trusted_weights: weights held by the trusted side.
        shares: what each worker holds.
        kv_per_token: KV per token, held by ``kv_holder``.
        arena: the arena of each direction and worker; each side holds its own.
    """

    mode: Mode
    prefill: Traffic
    decode: Traffic
    worker_sees: str
    trusted_weights: int
    shares: list[Share]
    kv_per_token: int
    arena: int

    @property
    def kv_holder(self) -> str:
        """The side that holds the KV cache: ``trusted`` or ``worker``."""
        return "worker" if self.mode.worker_keeps_kv else "trusted"

    @property
    def worker_weights(self) -> int:
        """Weights held by all workers together."""
        return sum(share.weights for share in self.shares)


def footprint(
    outline: Outline,
    mode: Mode,
    compute: Dtype,
    wire: Dtype,
    prefill_tokens: int,
    limits: Sequence[int | None] = (None,),
) -> Footprint:
    """The cost of a model in one mode.

    Args:
        outline: the model's parameters.
        mode: the split.
        compute: the dtype that both sides compute in.
        wire: the dtype of activations that cross.
        prefill_tokens: tokens of the prompt.
        limits: for each worker that shares the layers, the most bytes of weights that it can hold. None: no limit.

    Raises:
        LlamaSplitError: there are fewer layers than workers, or too little room.
    """
    geometry, workers = outline.geometry, len(limits)
    after_prefill = forward_sizes(geometry, 1, cached=prefill_tokens)
    return Footprint(
        mode=mode,
        prefill=forward_traffic(mode, geometry, forward_sizes(geometry, prefill_tokens), wire, workers),
        decode=forward_traffic(mode, geometry, after_prefill, wire, workers),
        worker_sees=REVEALED[mode],
        trusted_weights=_nbytes(outline, trusted_names(geometry.layers, mode), compute),
        shares=_shares(outline, mode, compute, limits),
        kv_per_token=2 * geometry.layers * geometry.kv_width * compute.itemsize,
        arena=default_arena_bytes(geometry, mode, wire),
    )


def _shares(outline: Outline, mode: Mode, compute: Dtype, limits: Sequence[int | None]) -> list[Share]:
    """Divide the layers among the workers; in mode op the first one holds the embedding as well."""
    layers = outline.geometry.layers

    def weights(held: range, *, first: bool) -> int:
        groups = outline.worker_groups(embedding=first and mode is Mode.OP, layers=held)
        return _nbytes(outline, (name for group in groups.values() for name in group), compute)

    everything = weights(range(layers), first=False)
    layer = everything - weights(range(1, layers), first=False)
    extras = [0] * len(limits)
    extras[-1] = everything - layers * layer
    extras[0] += weights(range(layers - 1), first=True) - weights(range(layers - 1), first=False)
    return [Share(held, weights(held, first=held.start == 0)) for held in divide(layer, layers, extras, limits)]


def _nbytes(outline: Outline, names: Iterable[str], compute: Dtype) -> int:
    return sum(prod(parameter_shape(outline.geometry, name)) for name in names) * compute.itemsize
