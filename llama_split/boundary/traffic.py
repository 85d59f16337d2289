"""Computes the traffic of one forward: calls, and bytes of the tensors that cross."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .geometry import Geometry
from .operations import BY_MODE, LAYERS, POSITIONS, Dtype, Mode, Operation, TensorSpec


def calls_per_forward(mode: Mode, geometry: Geometry, workers: int = 1) -> int:
    """The calls of one forward: 6 L + 2 for ``op``, 4 L + 1 for ``fused``, L + 1 for ``layer``, 1 for ``stack``.

    Where ``workers`` share the layers, ``stack`` takes a call for each of them.
    """
    return sum(times for _, times in _operations(mode, geometry, workers))


def _operations(mode: Mode, geometry: Geometry, workers: int) -> list[tuple[Operation, int]]:
    """The operations of one forward, and how often each is executed."""
    operations = [(operation, geometry.layers if operation.per_layer else 1) for operation in BY_MODE[mode]]
    return [*operations, (LAYERS, workers - 1)] if mode is Mode.STACK else operations


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


def forward_traffic(mode: Mode, geometry: Geometry, sizes: Mapping[str, int], wire: Dtype, workers: int = 1) -> Traffic:
    """The traffic of one forward, if every operation fits into one call; a mask for padding is not counted.

    Args:
        mode: the split.
        geometry: the model's sizes.
        sizes: as ``forward_sizes`` returns them.
        wire: the dtype of activations that cross.
        workers: how many share the layers.
    """

    def total(tensors: Iterable[TensorSpec]) -> int:
        return sum(tensor.nbytes(sizes, wire) for tensor in tensors)

    sent = workers * total([POSITIONS]) if mode.worker_keeps_kv else 0
    received = 0
    for operation, times in _operations(mode, geometry, workers):
        sent += times * total(operation.arguments)
        received += times * total([operation.result])
    return Traffic(calls_per_forward(mode, geometry, workers), sent, received)
