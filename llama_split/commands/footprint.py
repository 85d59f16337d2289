"""Computes what a split costs from a model's outline: calls and bytes of a forward, memory of each side.

Its lists of weights are those that the sides load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..boundary.choices import default_arena_bytes
from ..boundary.operations import REVEALED, Dtype, Mode
from ..boundary.traffic import Traffic, forward_sizes, forward_traffic
from ..checkpoint.outline import Outline, trusted_names
from ..checkpoint.shares import Share, shares_of, weight_bytes


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
        trusted_weights=weight_bytes(outline, trusted_names(geometry.layers, mode), compute),
        shares=shares_of(outline, mode, compute, limits),
        kv_per_token=2 * geometry.layers * geometry.kv_width * compute.itemsize,
        arena=default_arena_bytes(geometry, mode, wire),
    )
