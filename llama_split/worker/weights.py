"""The weights that a worker holds, and products with them into memory that the caller provides.

The query, key and value matrices are stacked into one, and so are gate and up, so that one operation covers each group.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from ..boundary.operations import Operation
from ..checkpoint import EMBEDDING, FINAL_NORM, LAYER_NORMS, Checkpoint, Progress, layer_name
from ..checkpoint.outline import STACKED
from ..model.decoder import DecoderLayer, RMSNorm
from ..model.program import WorkerOp


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the matrix product of ``left`` and ``right`` to ``out``, which may have another dtype; returns ``out``."""
    if out.dtype == left.dtype:
        return torch.matmul(left, right, out=out)
    return out.copy_(torch.matmul(left, right))


@dataclass(frozen=True)
class Linear:
    """One weight matrix [output width, input width], and its bias [output width] if the model has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, argument: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write ``argument`` [..., input width] times the transposed matrix to ``out`` [..., output width]."""
        rows = argument.reshape(-1, argument.shape[-1])
        results = out.view(-1, out.shape[-1])
        if self.bias is None:
            multiply(rows, self.weight.t(), results)
        elif out.dtype == argument.dtype:
            torch.addmm(self.bias, rows, self.weight.t(), out=results)
        else:
            results.copy_(torch.addmm(self.bias, rows, self.weight.t()))
        return out


class Weights:
    """The weights that a worker holds: the matrices of the layers, the output matrix and the norms.

    Args:
        checkpoint: where they are read.
        dtype: of weights and arithmetic.
        device: where they are held.
        progress: called with how many tensors are loaded, of how many.
        embedding: hold the embedding too, to serve mode op; if it is tied to the output matrix, it is held anyway.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        *,
        embedding: bool = False,
    ) -> None:
        self.geometry = checkpoint.geometry
        self.config = copy.deepcopy(checkpoint.config)  # callers may change the checkpoint's
        self.dtype = dtype
        self.device = device
        head = checkpoint.lm_head_name()
        loaded = checkpoint.load_stacked(checkpoint.outline.worker_groups(embedding=embedding), dtype, device, progress)
        self.embedding = loaded.get(EMBEDDING)
        self.lm_head = Linear(loaded[head], None)
        self.norm = RMSNorm(self.geometry.hidden, self.config.rms_norm_eps)
        self.norm.load_state_dict({"weight": loaded[FINAL_NORM]}, assign=True)
        self.norm.requires_grad_(False)
        self._linears: list[dict[Operation, Linear]] = []
        self.layers: list[DecoderLayer] = []
        for index in range(self.geometry.layers):
            self._linears.append(
                {op: Linear(loaded[index, op, "weight"], loaded.get((index, op, "bias"))) for op in STACKED}
            )
            layer = DecoderLayer(self.config, index)
            layer.load_state_dict({norm: loaded[layer_name(index, norm)] for norm in LAYER_NORMS}, assign=True)
            self.layers.append(layer.requires_grad_(False))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        linears = [linear for by_operation in self._linears for linear in by_operation.values()]
        held = [
            each for linear in (*linears, self.lm_head) for each in (linear.weight, linear.bias) if each is not None
        ]
        if self.embedding is not None and self.embedding is not self.lm_head.weight:
            held.append(self.embedding)
        norms = [parameter for module in (self.norm, *self.layers) for parameter in module.parameters()]
        return sum(tensor.nbytes for tensor in (*held, *norms))

    def linear(self, operation: Operation, layer: int) -> Linear:
        """The matrix of an operation in a layer.

        Raises:
            ValueError: there is no such layer.
        """
        if not operation.per_layer:
            return self.lm_head
        if not 0 <= layer < len(self._linears):
            raise ValueError(f"layer {layer} is asked for; the model has {len(self._linears)}")
        return self._linears[layer][operation]

    def execute(self, op: WorkerOp) -> torch.Tensor:
        """Execute one operation of a layer's program, into ordinary memory."""
        (argument,) = op.arguments
        linear = self.linear(op.operation, op.layer)
        return linear(argument, argument.new_empty((*argument.shape[:-1], linear.weight.shape[0])))
