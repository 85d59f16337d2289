"""The quantised model of the shield ``otp`` in one process, to compare with and to measure its quality."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM

from ..boundary.operations import LM_HEAD
from ..checkpoint import Checkpoint, QuantisedCheckpoint
from ..checkpoint.outline import STACKED
from ..model.integers import dequantise, greatest_norm, levels_for, multiply_exactly, quantise_tokens


class QuantisedLinear(nn.Module):
    """A linear layer with whole numbers, as trusted side and worker compute it together.

    Args:
        quantised_mk: Q, int8.
        scale_m: w, float32.
        bias_m: float32, or None.
        levels: the greatest whole number of an argument.
    """

    def __init__(
        self, quantised_mk: torch.Tensor, scale_m: torch.Tensor, bias_m: torch.Tensor | None, levels: int
    ) -> None:
        super().__init__()
        self._quantised_mk, self._scale_m, self._bias_m, self._levels = quantised_mk, scale_m, bias_m, levels

    def forward(self, argument: torch.Tensor) -> torch.Tensor:
        """[..., k] to [..., m] in the argument's dtype."""
        z_Nk, scale_N = quantise_tokens(argument.reshape(-1, argument.shape[-1]), self._levels)
        product_Nm = multiply_exactly(z_Nk, self._quantised_mk)
        result_Nm = dequantise(product_Nm, scale_N, self._scale_m, self._bias_m)
        return result_Nm.to(argument.dtype).view(*argument.shape[:-1], -1)


def quantise(model: LlamaForCausalLM, checkpoint: Checkpoint) -> LlamaForCausalLM:
    """Replace all linear layers of a model, in place, by those of the shield; returns the model."""
    weights = QuantisedCheckpoint(checkpoint)
    for matrix in weights.widths:
        operation, layer = matrix
        blocks = list(weights.blocks(matrix))
        quantised_mk = torch.cat([block.quantised_mk for block in blocks])
        scale_m = torch.cat([block.scale_m for block in blocks])
        bias_m, levels = weights.bias(matrix), levels_for(greatest_norm(quantised_mk))
        paths = [f"model.layers.{layer}.{name}" for name in STACKED.get(operation, ())]
        first = 0
        for path in ["lm_head"] if operation is LM_HEAD else paths:
            rows = slice(first, first + model.get_submodule(path).out_features)
            bias = None if bias_m is None else bias_m[rows]
            model.set_submodule(path, QuantisedLinear(quantised_mk[rows], scale_m[rows], bias, levels))
            first = rows.stop
    return model
