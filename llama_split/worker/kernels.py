"""The worker's arithmetic: products with weight matrices, into memory that the caller provides.

Query, key and value matrices are stacked into one, gate and up into another, so that each pair of sides exchanges one
tensor for all of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from ..checkpoint import EMBEDDING, FINAL_NORM, LAYER_NORMS, Checkpoint, Progress, layer_name
from ..decoder import DecoderLayer, RMSNorm
from ..operations import DOWN, GATE_UP, QKV, O, Operation
from ..steps import Step

_PARTS: dict[Operation, tuple[str, ...]] = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    O: ("self_attn.o_proj",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN: ("mlp.down_proj",),
}


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The matrix product, into ``out``, which may be of another dtype."""
    if out.dtype == left.dtype:
        return torch.matmul(left, right, out=out)
    return out.copy_(torch.matmul(left, right))


@dataclass(frozen=True)
class Linear:
    """One weight matrix [output width, input width], and its bias if the model has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, argument: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``argument`` [..., input width] times the transposed matrix, into ``out`` [..., output width]."""
        rows = argument.reshape(-1, argument.shape[-1])
        results = out.view(-1, out.shape[-1])
        if self.bias is None:
            multiply(rows, self.weight.t(), results)
        elif out.dtype == argument.dtype:
            torch.addmm(self.bias, rows, self.weight.t(), out=results)
        else:
            results.copy_(torch.addmm(self.bias, rows, self.weight.t()))
        return out


def weight_groups(checkpoint: Checkpoint, *, embedding: bool) -> dict[object, list[str]]:
    """The checkpoint's parameters that a worker holds, each group stacked into one tensor; see ``Weights``."""
    layers = range(checkpoint.geometry.layers)
    groups: dict[object, list[str]] = {
        (index, operation, kind): [layer_name(index, f"{part}.{kind}") for part in parts]
        for index in layers
        for operation, parts in _PARTS.items()
        for kind in _kinds(operation, checkpoint.config)
    }
    head = checkpoint.lm_head_name()
    single = [*(layer_name(index, norm) for index in layers for norm in LAYER_NORMS), FINAL_NORM, head]
    if embedding and head != EMBEDDING:
        single.append(EMBEDDING)
    groups.update({name: [name] for name in single})
    return groups


def _kinds(operation: Operation, config: LlamaConfig) -> tuple[str, ...]:
    biased = config.attention_bias if operation in (QKV, O) else config.mlp_bias
    return ("weight", "bias") if biased else ("weight",)


class Weights:
    """All that the worker holds: every matrix of the layers and the output matrix, and the norms.

    The embedding is held if it is the output matrix as well, or if ``embedding`` says that mode ``op`` is to be served.
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
        self.config = copy.deepcopy(checkpoint.config)  # the checkpoint's may be changed by its owner
        self.dtype = dtype
        self.device = device
        head = checkpoint.lm_head_name()
        loaded = checkpoint.load_stacked(weight_groups(checkpoint, embedding=embedding), dtype, device, progress)
        self.embedding = loaded.get(EMBEDDING)
        self.lm_head = Linear(loaded[head], None)
        self.norm = RMSNorm(self.geometry.hidden, self.config.rms_norm_eps)
        self.norm.load_state_dict({"weight": loaded[FINAL_NORM]}, assign=True)
        self.norm.requires_grad_(False)
        self._linears: list[dict[Operation, Linear]] = []
        self.layers: list[DecoderLayer] = []
        for index in range(self.geometry.layers):
            self._linears.append(
                {op: Linear(loaded[index, op, "weight"], loaded.get((index, op, "bias"))) for op in _PARTS}
            )
            layer = DecoderLayer(self.config, index)
            layer.load_state_dict({norm: loaded[layer_name(index, norm)] for norm in LAYER_NORMS}, assign=True)
            self.layers.append(layer.requires_grad_(False))

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices and norms."""
        linears = [linear for by_operation in self._linears for linear in by_operation.values()]
        held = [
            each for linear in (*linears, self.lm_head) for each in (linear.weight, linear.bias) if each is not None
        ]
        if self.embedding is not None and self.embedding is not self.lm_head.weight:
            held.append(self.embedding)
        norms = [parameter for module in (self.norm, *self.layers) for parameter in module.parameters()]
        return sum(tensor.nbytes for tensor in (*held, *norms))

    def linear(self, operation: Operation, layer: int) -> Linear:
        """The matrix of an operation.

        Raises:
            ValueError: there is no such layer.
        """
        if not operation.per_layer:
            return self.lm_head
        if not 0 <= layer < len(self._linears):
            raise ValueError(f"layer {layer} is asked for; the model has {len(self._linears)}")
        return self._linears[layer][operation]

    def perform(self, step: Step) -> torch.Tensor:
        """Make a step of a forward here, in ordinary memory."""
        (argument,) = step.arguments
        linear = self.linear(step.operation, step.layer)
        return linear(argument, argument.new_empty((*argument.shape[:-1], linear.weight.shape[0])))
