"""The matrices that operations multiply with, each stacked of several where an operation covers a group."""

from __future__ import annotations

from typing import NamedTuple

from ..boundary.operations import LM_HEAD, Operation
from .outline import STACKED, Outline

MatrixKey = tuple[Operation, int]
"""Names a matrix: the operation that it belongs to, and the layer, 0 for the output matrix."""


class Stacked(NamedTuple):
    """The names of the parameters that a matrix is stacked of, and of its biases, if the model has any."""

    weights: list[str]
    biases: list[str]


def stacked_matrices(outline: Outline) -> dict[MatrixKey, Stacked]:
    """All matrices of a model, those of the layers first."""
    groups = outline.worker_groups(embedding=False)
    found: dict[MatrixKey, Stacked] = {
        (operation, layer): Stacked(groups[layer, operation, "weight"], groups.get((layer, operation, "bias"), []))
        for layer in range(outline.geometry.layers)
        for operation in STACKED
    }
    return {**found, (LM_HEAD, 0): Stacked([outline.lm_head], [])}


def matrix_name(matrix: MatrixKey) -> str:
    """A matrix for messages."""
    operation, layer = matrix
    return f"{operation.name} of layer {layer}" if operation.per_layer else operation.name
