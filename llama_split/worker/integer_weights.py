"""The weights of a worker that computes with whole numbers: matrices of 8 bits, and no norms, biases or scales.

Such a worker multiplies 32-bit arguments modulo 2³², exactly. What the numbers mean only the trusted side knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..boundary.division import layers_text
from ..boundary.operations import LM_HEAD, Operation
from ..checkpoint import Checkpoint, Progress, QuantisedCheckpoint
from ..model.integers import multiply_exactly


@dataclass(frozen=True)
class IntegerLinear:
    """One weight matrix, int8 [output width, input width]."""

    weight: torch.Tensor

    def __call__(self, argument: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write ``argument`` [..., input width] times the transposed matrix, modulo 2³², to ``out``; both are int32."""
        rows = argument.reshape(-1, argument.shape[-1])
        out.view(-1, out.shape[-1]).copy_(multiply_exactly(rows, self.weight))
        return out


class IntegerWeights:
    """The matrices of a worker's layers, and the output matrix where it has the last one.

    Args:
        checkpoint: where they are read.
        device: where they are held.
        progress: called with how many matrices are loaded, of how many.
        layers: the layers to hold, where several workers share them. None: all.
    """

    dtype = torch.int8

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        progress: Progress | None = None,
        *,
        layers: range | None = None,
    ) -> None:
        self.geometry = checkpoint.geometry
        self.held = range(self.geometry.layers) if layers is None else layers
        self.device = device
        quantised = QuantisedCheckpoint(checkpoint)
        holds_last = self.held.stop == self.geometry.layers
        wanted = [
            matrix for matrix in quantised.widths if (matrix[1] in self.held if matrix[0].per_layer else holds_last)
        ]
        self._linears: dict[tuple[Operation, int], IntegerLinear] = {}
        for done, matrix in enumerate(wanted, start=1):
            weight = torch.empty(tuple(quantised.widths[matrix]), dtype=self.dtype, device=device)
            for block in quantised.blocks(matrix):
                weight[block.first : block.first + len(block.scale_m)].copy_(block.quantised_mk)
            self._linears[matrix] = IntegerLinear(weight)
            if progress is not None:
                progress(done, len(wanted))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(linear.weight.nbytes for linear in self._linears.values())

    def linear(self, operation: Operation, layer: int) -> IntegerLinear:
        """The matrix of an operation in a layer, or the output matrix.

        Raises:
            ValueError: this worker does not hold it.
        """
        found = self._linears.get((operation, layer if operation.per_layer else 0))
        if found is None:
            what = f"layer {layer}" if operation is not LM_HEAD else "the output matrix"
            raise ValueError(f"{what} is asked for; this worker holds layers {layers_text(self.held)}")
        return found
