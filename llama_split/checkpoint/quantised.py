"""Reads a checkpoint's matrices in 8 bits, a block of rows at a time: for workers that compute with whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..boundary.operations import LM_HEAD, Operation
from ..errors import CheckpointError
from ..model.integers import quantise_rows
from .base import BLOCK_NUMBERS, Checkpoint

MatrixKey = tuple[Operation, int]
"""Names a matrix: the operation that it belongs to, and the layer, 0 for the output matrix."""


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
    """The matrices that operations multiply with, each stacked of several where an operation covers a group."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        outline = checkpoint.outline
        groups = outline.worker_groups(embedding=False)
        self._names: dict[MatrixKey, list[str]] = {}
        self._biases: dict[MatrixKey, list[str]] = {}
        for key, names in groups.items():
            if isinstance(key, tuple):
                layer, operation, parameter = key
                (self._names if parameter == "weight" else self._biases)[operation, layer] = names
        self._names[LM_HEAD, 0] = [outline.lm_head]
        self.widths: dict[MatrixKey, Widths] = {matrix: self._stacked(names) for matrix, names in self._names.items()}

    def blocks(self, matrix: MatrixKey) -> Iterator[Block]:
        """The matrix in blocks of rows, in their order.

        Raises:
            CheckpointError: a weight is not finite.
        """
        first = 0
        for name in self._names[matrix]:
            rows, width = self._checkpoint.shape(name)
            step = max(1, BLOCK_NUMBERS // width)
            for start in range(0, rows, step):
                stored = self._checkpoint.rows(name, start, min(start + step, rows))
                yield Block(first, *_quantised(self._checkpoint, name, stored))
                first += len(stored)

    def bias(self, matrix: MatrixKey) -> torch.Tensor | None:
        """The bias that is added after a matrix, float32 [m]; None where there is none."""
        names = self._biases.get(matrix)
        return None if names is None else torch.cat([self._checkpoint.read(name).to(torch.float32) for name in names])

    def _stacked(self, names: list[str]) -> Widths:
        shapes = [self._checkpoint.shape(name) for name in names]
        return Widths(sum(rows for rows, _ in shapes), shapes[0][1])


def matrix_name(matrix: MatrixKey) -> str:
    """A matrix for messages."""
    operation, layer = matrix
    return f"{operation.name} of layer {layer}" if operation.per_layer else operation.name


def _quantised(checkpoint: Checkpoint, name: str, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return quantise_rows(stored)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} has {name} with numbers that are not finite: {error}") from None
