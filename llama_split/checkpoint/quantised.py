"""Reads a checkpoint's matrices in 8 bits, a block of rows at a time: for workers that compute with whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import CheckpointError
from ..model.integers import quantise_rows
from .base import Checkpoint
from .matrices import MatrixKey, stacked_matrices


class Widths(NamedTuple):
    """The shape of a matrix: m and k."""

    output: int
    input: int


class Block(NamedTuple):
    """Rows of a quantised matrix: ``first`` is the place of the first; Q is int8 [rows, k], w float32 [rows]."""

    first: int
    quantised_mk: torch.Tensor
    scale_m: torch.Tensor


class QuantisedCheckpoint:
    """The matrices that operations multiply with, in 8 bits."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._matrices = stacked_matrices(checkpoint.outline)
        self.widths: dict[MatrixKey, Widths] = {
            matrix: self._widths_of(parts.weights) for matrix, parts in self._matrices.items()
        }

    def blocks(self, matrix: MatrixKey) -> Iterator[Block]:
        """The matrix in blocks of rows, in their order.

        Raises:
            CheckpointError: a weight is not finite.
        """
        first = 0
        for name in self._matrices[matrix].weights:
            for stored in self._checkpoint.blocks(name):
                yield Block(first, *_quantised(self._checkpoint, name, stored))
                first += len(stored)

    def bias(self, matrix: MatrixKey) -> torch.Tensor | None:
        """The bias that is added after a matrix, float32 [m]; None where there is none."""
        names = self._matrices[matrix].biases
        return torch.cat([self._checkpoint.read(name).to(torch.float32) for name in names]) if names else None

    def _widths_of(self, names: list[str]) -> Widths:
        shapes = [self._checkpoint.shape(name) for name in names]
        return Widths(sum(rows for rows, _ in shapes), shapes[0][1])


def _quantised(checkpoint: Checkpoint, name: str, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return quantise_rows(stored)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} has {name} with numbers that are not finite: {error}") from None
