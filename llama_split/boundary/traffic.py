"""Computes the traffic of one forward: calls, and bytes of the tensors that cross."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .geometry import Geometry
from .operations import BY_MODE, POSITIONS, Dtype, Mode, TensorSpec


def calls_per_forward(mode: Mode, geometry: Geometry) -> int:
    """The calls of one forward: 6 L + 2 for ``op``, 4 L + 1 for ``fused``, L + 1 for ``layer``, 1 for ``stack``."""
    return sum(geometry.layers if operation.per_layer else 1 for operation in BY_MODE[mode])


def forward_sizes(
    geometry: Geometry, tokens: int, *, cached: int = 0, batch: int = 1, logits: int = 1
) -> dict[str, int]:
    """The size of every dimension in a forward.

    Args:
        geometry: the model's sizes.
        tokens: new tokens per row.
        cached: tokens per row that are already cached.
        batch: rows.
        logits: tokens per row whose logits are asked for.
    """
    free = {"B": batch, "T": tokens, "S": cached + tokens, "N": logits, "H": geometry.heads}
    return {**geometry.widths, **free}


@dataclass(frozen=True)
class Traffic:
    """The traffic of one forward: calls, and bytes of the tensors that cross in each direction."""

    calls: int
    sent: int
    received: int


def forward_traffic(mode: Mode, geometry: Geometry, sizes: Mapping[str, int], wire: Dtype) -> Traffic:
    """The traffic of one forward, if every operation fits into one call; a mask for padding is not counted.

    Args:
        mode: the split.
        geometry: the model's sizes.
        sizes: as ``forward_sizes`` returns them.
        wire: the dtype of activations that cross.
    """

    def total(tensors: Iterable[TensorSpec]) -> int:
        return sum(tensor.nbytes(sizes, wire) for tensor in tensors)

    sent = total([POSITIONS]) if mode.worker_keeps_kv else 0
    received = 0
    for operation in BY_MODE[mode]:
        times = geometry.layers if operation.per_layer else 1
        sent += times * total(operation.arguments)
        received += times * total([operation.result])
    return Traffic(calls_per_forward(mode, geometry), sent, received)
