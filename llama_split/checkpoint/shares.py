"""Which layers each of several workers holds, and how large its weights are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from ..boundary.division import divide
from ..boundary.operations import Dtype, Mode
from .outline import Outline, parameter_shape


@dataclass(frozen=True)
class Share:
    """What one worker holds: its layers, and the bytes of their weights and of what comes with them."""

    layers: range
    weights: int


def shares_of(outline: Outline, mode: Mode, compute: Dtype, limits: Sequence[int | None]) -> list[Share]:
    """Divide the layers among workers; in mode op the first one holds the embedding as well.

    Args:
        outline: the model's parameters.
        mode: the split.
        compute: the dtype of the weights.
        limits: for each worker, the most bytes of weights that it can hold. None: no limit.

    Raises:
        LlamaSplitError: there are fewer layers than workers, or too little room.
    """
    layers = outline.geometry.layers

    def weights(held: range, *, first: bool) -> int:
        groups = outline.worker_groups(embedding=first and mode is Mode.OP, layers=held)
        return weight_bytes(outline, (name for group in groups.values() for name in group), compute)

    everything = weights(range(layers), first=False)
    layer = everything - weights(range(1, layers), first=False)
    extras = [0] * len(limits)
    extras[-1] = everything - layers * layer
    extras[0] += weights(range(layers - 1), first=True) - weights(range(layers - 1), first=False)
    return [Share(held, weights(held, first=held.start == 0)) for held in divide(layer, layers, extras, limits)]


def weight_bytes(outline: Outline, names: Iterable[str], compute: Dtype) -> int:
    """The bytes of these parameters."""
    return sum(prod(parameter_shape(outline.geometry, name)) for name in names) * compute.itemsize
