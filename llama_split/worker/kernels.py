"""The worker's arithmetic: products with the weight matrices, into memory that the caller provides.

Query, key and value matrices are stacked into one, gate and up into another, so that each pair of sides exchanges one
tensor for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checkpoint import FINAL_NORM, LAYER_NORMS, Checkpoint, Progress, layer_name
from ..decoder import DecoderLayer, RMSNorm, Step
from ..operations import DOWN, GATE_UP, QKV, O, Operation

_PARTS: dict[Operation, tuple[str, ...]] = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    O: ("self_attn.o_proj",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN: ("mlp.down_proj",),
}


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
            torch.mm(rows, self.weight.t(), out=results)
        else:
            torch.addmm(self.bias, rows, self.weight.t(), out=results)
        return out


class Weights:
    """All that the worker holds: every matrix of the layers and the output matrix, and the norms.

    The embedding is not held unless it is the output matrix as well.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> None:
        self.geometry = checkpoint.geometry
        self.config = checkpoint.config
        self.config._attn_implementation = "sdpa"  # noqa: SLF001 - transformers' own name for this public choice
        self.dtype = dtype
        self.device = device
        names = [
            layer_name(index, f"{part}.{kind}")
            for index in range(self.geometry.layers)
            for operation, parts in _PARTS.items()
            for part in parts
            for kind in self._kinds(operation)
        ]
        norms = [layer_name(index, norm) for index in range(self.geometry.layers) for norm in LAYER_NORMS]
        head = checkpoint.lm_head_name()
        loaded = checkpoint.load([*names, *norms, FINAL_NORM, head], dtype, device, progress)
        self.lm_head = Linear(loaded.pop(head), None)
        self.norm = RMSNorm(self.geometry.hidden, self.config.rms_norm_eps)
        self.norm.load_state_dict({"weight": loaded.pop(FINAL_NORM)}, assign=True)
        self.norm.requires_grad_(False)
        self._linears: list[dict[Operation, Linear]] = []
        self.layers: list[DecoderLayer] = []
        for index in range(self.geometry.layers):
            self._linears.append({op: self._stack(loaded, index, op) for op in _PARTS})
            layer = DecoderLayer(self.config, index)
            layer.load_state_dict({norm: loaded.pop(layer_name(index, norm)) for norm in LAYER_NORMS}, assign=True)
            self.layers.append(layer.requires_grad_(False))

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
        linear = self.linear(step.operation, step.layer)
        return linear(step.argument, step.argument.new_empty((*step.argument.shape[:-1], linear.weight.shape[0])))

    def _kinds(self, operation: Operation) -> tuple[str, ...]:
        biased = self.config.attention_bias if operation in (QKV, O) else self.config.mlp_bias
        return ("weight", "bias") if biased else ("weight",)

    def _stack(self, loaded: dict[str, torch.Tensor], index: int, operation: Operation) -> Linear:
        stacked: dict[str, torch.Tensor] = {}
        for kind in self._kinds(operation):
            parts = [loaded.pop(layer_name(index, f"{part}.{kind}")) for part in _PARTS[operation]]
            stacked[kind] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Linear(stacked["weight"], stacked.get("bias"))


def result_shape(operation: Operation, weights: Weights, argument: torch.Tensor) -> tuple[int, ...]:
    """The shape of an operation's result, after its argument was checked against the boundary's description.

    Raises:
        ValueError: the argument's width or dtype is not this operation's.
    """
    width = operation.input_width(weights.geometry)
    if argument.dim() < 1 or argument.shape[-1] != width or argument.dtype != weights.dtype:
        raise ValueError(
            f"{operation.name} takes [..., {width}] of {weights.dtype}, not {list(argument.shape)} of {argument.dtype}"
        )
    return (*argument.shape[:-1], operation.output_width(weights.geometry))
