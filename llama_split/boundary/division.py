"""How the layers of a model are divided among several workers. Each holds a range of them; the last one also holds the
final norm and the output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from shmtransport.units import size_text

from ..errors import LlamaSplitError, WorkerMismatch


def parse_layers(text: str, layers: int) -> range:
    """The layers that a text like ``0-15`` names, first and last included.

    Args:
        text: as the user wrote it.
        layers: how many the model has.

    Raises:
        LlamaSplitError: it is no such text, or the model has no such layers.
    """
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise LlamaSplitError(f"layers {text!r}: write the first and the last, for example 0-{layers - 1}")
    if not int(first) <= int(last) < layers:
        raise LlamaSplitError(f"layers {text} are not layers of this model, which has 0-{layers - 1}")
    return range(int(first), int(last) + 1)


def layers_text(layers: range) -> str:
    """A range of layers as ``parse_layers`` takes it."""
    return f"{layers.start}-{layers.stop - 1}"


def check_complete(held: Sequence[range], layers: int) -> None:
    """Check that workers hold each layer of a model once, the first worker the first ones.

    Args:
        held: the layers of each worker, in the workers' order.
        layers: how many the model has.

    Raises:
        WorkerMismatch: a layer is held by none or by two, or the workers are in another order.
    """
    ends = [0, *(one.stop for one in held)]
    if [one.start for one in held] != ends[:-1] or ends[-1] != layers:
        found = ", ".join(map(layers_text, held))
        raise WorkerMismatch(
            f"the workers hold layers {found}, and the model has 0-{layers - 1}: each layer must be held once, and the "
            "workers named in the order of their layers"
        )


def divide(layer_bytes: int, layers: int, extras: Sequence[int], limits: Sequence[int | None]) -> list[range]:
    """Divide layers among workers so that the weights of the largest share are as small as possible.

    Args:
        layer_bytes: the weights of one layer.
        layers: how many there are, at least one for each worker.
        extras: for each worker, the bytes that it holds besides its layers.
        limits: for each worker, the most bytes that it can hold. None: no limit.

    Raises:
        LlamaSplitError: there are fewer layers than workers, or the limits leave no room for all layers.
    """
    if layers < len(limits):
        raise LlamaSplitError(f"{len(limits)} workers can't share {layers} layers: use at most {layers} workers")
    counts = [0] * len(limits)

    def can_take_one_more(index: int) -> bool:
        limit = limits[index]
        return limit is None or extras[index] + (counts[index] + 1) * layer_bytes <= limit

    def held(index: int) -> tuple[bool, int]:
        return counts[index] > 0, extras[index] + counts[index] * layer_bytes  # each gets a layer first

    for _ in range(layers):
        room = [index for index in range(len(limits)) if can_take_one_more(index)]
        if not room or any(counts[index] == 0 and index not in room for index in range(len(limits))):
            raise LlamaSplitError(
                f"the limits leave no room for {layers} layers of {size_text(layer_bytes)} and what the first and last "
                "worker hold besides: raise --max-weight-bytes, or use more workers"
            )
        counts[min(room, key=held)] += 1
    ends = [0, *accumulate(counts)]
    return [range(first, end) for first, end in pairwise(ends)]
