"""The weights that a worker holds, and products with them into memory that the caller provides.

The query, key and value matrices are stacked into one, and so are gate and up, so that one operation covers each group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..boundary.division import layers_text
from ..boundary.operations import Operation
from ..checkpoint import EMBEDDING, FINAL_NORM, LAYER_NORMS, Checkpoint, Progress, layer_name
from ..checkpoint.outline import STACKED
from ..model.decoder import DecoderLayer, RMSNorm
from ..model.program import WorkerOp


def _find_one_dnn() -> Callable[..., torch.Tensor] | None:
    """Return oneDNN's product, which torch's own compiler uses, where torch.matmul takes MKL's in float32."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if has_both else None
    return None if found is None else found.default


_CPU: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # nothing with a torch that can't tell
_IS_AMD = "AMD" in _CPU.get("cpu_name", "")
# MKL is slow on AMD's processors: with SmolLM2's matrices, oneDNN's product was 1.5 to 2 times as fast for one row, 2
# to 2.5 times for up to 16. On one of Intel's, MKL read weights as fast as memory gives them.
_one_dnn = _find_one_dnn() if _IS_AMD else None
# In bfloat16, one row's product as a vector took a third less time on one of Intel's processors, and a quarter more on
# one of AMD's that computes in bfloat16.
_IS_FASTER_BY_VECTOR = not (_IS_AMD and _CPU.get("avx512_bf16", False))
_ROWS_FOR_ONE_DNN = (1, 2, 4, 8, 16)
"""It keeps about a megabyte for each number of rows and shape of matrix for good: so there are few of them."""


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
        if _one_dnn is not None and self._is_for_one_dnn(len(rows)):
            missing = next(number for number in _ROWS_FOR_ONE_DNN if number >= len(rows)) - len(rows)
            filled = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
            results.copy_(_one_dnn(filled, self.weight, self.bias, "none", [], "")[: len(rows)])
        elif len(rows) == 1 and self.bias is None and self._is_faster_by_vector and out.dtype == argument.dtype:
            torch.mv(self.weight, rows[0], out=results[0])
        elif self.bias is None:
            multiply(rows, self.weight.t(), results)
        elif out.dtype == argument.dtype:
            torch.addmm(self.bias, rows, self.weight.t(), out=results)
        else:
            results.copy_(torch.addmm(self.bias, rows, self.weight.t()))
        return out

    def _is_for_one_dnn(self, rows: int) -> bool:
        """Whether oneDNN multiplies with this matrix; it takes a bias for contiguous, whatever its strides."""
        takes_bias = self.bias is None or self.bias.is_contiguous()
        takes_weight = self.weight.dtype == torch.float32 and self.weight.device.type == "cpu"
        return 0 < rows <= _ROWS_FOR_ONE_DNN[-1] and takes_bias and takes_weight

    @property
    def _is_faster_by_vector(self) -> bool:
        """Whether one row takes less time as a vector: so in bfloat16 on most CPUs, and not in other dtypes."""
        return _IS_FASTER_BY_VECTOR and self.weight.dtype == torch.bfloat16 and self.weight.device.type == "cpu"


class Head(NamedTuple):
    """What follows the last layer: the final norm and the output matrix."""

    norm: RMSNorm
    linear: Linear


class Weights:
    """The weights that a worker holds: the matrices and norms of its layers.

    The worker of the last layer also holds the final norm and the output matrix. Within this class and ``Sessions``, a
    layer's position is its index among those that are held.

    Args:
        checkpoint: where they are read.
        dtype: of weights and arithmetic.
        device: where they are held.
        progress: called with how many tensors are loaded, of how many.
        embedding: hold the embedding too, to serve mode op; a worker with an output matrix that is tied to it holds it
            anyway.
        layers: the layers to hold, where several workers share them. None: all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        *,
        embedding: bool = False,
        layers: range | None = None,
    ) -> None:
        self.geometry = checkpoint.geometry
        self.held = range(self.geometry.layers) if layers is None else layers
        self.config = copy.deepcopy(checkpoint.config)  # callers may change the checkpoint's
        self.dtype = dtype
        self.device = device
        groups = checkpoint.outline.worker_groups(embedding=embedding, layers=self.held)
        loaded = checkpoint.load_stacked(groups, dtype, device, progress)
        self.embedding = loaded.get(EMBEDDING)
        self._head: Head | None = None
        if self.held.stop == self.geometry.layers:
            norm = RMSNorm(self.geometry.hidden, self.config.rms_norm_eps)
            norm.load_state_dict({"weight": loaded[FINAL_NORM]}, assign=True)
            self._head = Head(norm.requires_grad_(False), Linear(loaded[checkpoint.lm_head_name()], None))
        self._linears: list[dict[Operation, Linear]] = []
        self.layers: list[DecoderLayer] = []
        for position, index in enumerate(self.held):
            self._linears.append(
                {op: Linear(loaded[index, op, "weight"], loaded.get((index, op, "bias"))) for op in STACKED}
            )
            layer = DecoderLayer(self.config, position)
            layer.load_state_dict({norm: loaded[layer_name(index, norm)] for norm in LAYER_NORMS}, assign=True)
            self.layers.append(layer.requires_grad_(False))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        linears = [linear for by_operation in self._linears for linear in by_operation.values()]
        modules: list[nn.Module] = [*self.layers]
        if self._head is not None:
            linears.append(self._head.linear)
            modules.append(self._head.norm)
        held = [each for linear in linears for each in (linear.weight, linear.bias) if each is not None]
        if self.embedding is not None and all(self.embedding is not each for each in held):
            held.append(self.embedding)
        norms = [parameter for module in modules for parameter in module.parameters()]
        return sum(tensor.nbytes for tensor in (*held, *norms))

    @property
    def head(self) -> Head:
        """The final norm and the output matrix.

        Raises:
            ValueError: another worker holds them.
        """
        if self._head is None:
            raise ValueError(f"this worker holds layers {layers_text(self.held)} and no output matrix")
        return self._head

    def position(self, layer: int) -> int:
        """Where a layer is among those that are held.

        Raises:
            ValueError: this worker does not hold it.
        """
        if layer not in self.held:
            raise ValueError(f"layer {layer} is asked for; this worker holds {layers_text(self.held)}")
        return layer - self.held.start

    def linear(self, operation: Operation, layer: int) -> Linear:
        """The matrix of an operation in a layer, or the output matrix.

        Raises:
            ValueError: this worker does not hold it.
        """
        return self._linears[self.position(layer)][operation] if operation.per_layer else self.head.linear

    def execute(self, op: WorkerOp) -> torch.Tensor:
        """Execute one operation of a layer's program, which has the layer's position, into ordinary memory."""
        (argument,) = op.arguments
        linear = self._linears[op.layer][op.operation]
        return linear(argument, argument.new_empty((*argument.shape[:-1], linear.weight.shape[0])))
