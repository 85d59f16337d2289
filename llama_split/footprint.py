"""What a split costs, from a model's configuration alone: calls and bytes of a forward, memory of each side.

It knows both sides, as only the command line may: the lists of weights are those that the sides load.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint
from .config import default_arena_bytes
from .operations import REVEALED, Mode, Traffic, forward_sizes, forward_traffic
from .trusted.part import TrustedPart
from .worker.kernels import weight_groups


@dataclass(frozen=True)
class Footprint:
    """One model in one mode; all sizes are in bytes.

    ``prefill`` is a forward of so many tokens, of which the last one's logits are wanted, and ``decode`` one of a
    single token after them. ``kv_per_token`` is held by the worker or by the trusted side, ``arena`` by each for its
    own direction.
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
        """Which side holds the KV cache: ``trusted`` or ``worker``."""
        return "worker" if self.mode.worker_keeps_kv else "trusted"


def footprint(
    checkpoint: Checkpoint, mode: Mode, compute: torch.dtype, wire: torch.dtype, prefill_tokens: int
) -> Footprint:
    """What this model costs in this mode, where both sides compute in ``compute`` and activations cross in ``wire``."""
    geometry = checkpoint.geometry

    def nbytes(names: Iterable[str]) -> int:
        return sum(torch.Size(checkpoint.shape(name)).numel() for name in names) * compute.itemsize

    groups = weight_groups(checkpoint, embedding=mode is Mode.OP)
    return Footprint(
        mode=mode,
        prefill=forward_traffic(mode, geometry, forward_sizes(geometry, prefill_tokens), wire),
        decode=forward_traffic(mode, geometry, forward_sizes(geometry, 1, cached=prefill_tokens), wire),
        worker_sees=REVEALED[mode],
        trusted_weights=nbytes(TrustedPart.weight_names(checkpoint.config, mode)),
        worker_weights=nbytes(name for group in groups.values() for name in group),
        kv_per_token=2 * geometry.layers * geometry.kv_width * compute.itemsize,
        arena=default_arena_bytes(geometry, mode, wire),
    )
