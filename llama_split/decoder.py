"""A decoder layer's arithmetic, written once for every split.

A forward is a generator: it yields each product with a weight matrix as a ``Step`` and is sent the result. Who runs
it decides where the product is made: the trusted side's ``fused`` mode sends steps to the worker, the worker's
``layer`` operation makes them itself. Each ``yield`` is the one point at which a forward can wait, so that several
forwards can be run in turn.

Shape suffixes: B batch, T tokens, D hidden, H heads, G key/value heads, S cached positions, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .operations import DOWN, GATE_UP, QKV, Geometry, O, Operation

Allocator = Callable[[Sequence[int], torch.dtype], torch.Tensor]


def empty_on(device: torch.device) -> Allocator:
    """An allocator of ordinary memory on a device."""
    return lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device=device)


@dataclass(frozen=True)
class Step:
    """One product to be made: ``operation`` of ``layer`` on ``argument`` [B, T, input width]."""

    operation: Operation
    layer: int
    argument: torch.Tensor


Steps = Generator[Step, torch.Tensor, torch.Tensor]


def run(steps: Steps, perform: Callable[[Step], torch.Tensor]) -> torch.Tensor:
    """Drive one forward to its end, making each step at once."""
    try:
        step = next(steps)
        while True:
            step = steps.send(perform(step))
    except StopIteration as end:
        result: torch.Tensor = end.value
        return result


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward share: rotary cosines and sines, the mask (None: causal), the KV cache."""

    cos_sin: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    cache: Cache | None


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), accumulated in float32 as transformers does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, hidden_BTD: torch.Tensor, empty: Allocator) -> torch.Tensor:
        wide_BTD = hidden_BTD.to(torch.float32)
        variance_BT1 = wide_BTD.pow(2).mean(-1, keepdim=True)
        normed_BTD = (wide_BTD * torch.rsqrt(variance_BT1 + self.eps)).to(hidden_BTD.dtype)
        return torch.mul(self.weight, normed_BTD, out=empty(normed_BTD.shape, normed_BTD.dtype))


class DecoderLayer(nn.Module):
    """The part of a layer that has no weight matrix: two norms, rotary attention, the gated activation, residuals."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        geometry = Geometry.of(config)
        self.input_layernorm = RMSNorm(geometry.hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(geometry.hidden, config.rms_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.index = index
        self.config = config
        self.widths = [geometry.query_width, geometry.kv_width, geometry.kv_width]
        self.head_dim = geometry.head_dim
        # Read by the attention functions of transformers.
        self.layer_idx = index
        self.num_key_value_groups = geometry.heads // geometry.kv_heads
        self.scaling = geometry.head_dim**-0.5
        self.is_causal = True

    def steps(
        self,
        hidden_BTD: torch.Tensor,
        context: AttentionContext,
        empty: Allocator,
        result: torch.Tensor | None = None,
    ) -> Steps:
        """This layer's forward. Arguments of steps are made in ``empty``'s memory, the result in ``result``."""
        normed_BTD = self.input_layernorm(hidden_BTD, empty)
        qkv = yield Step(QKV, self.index, normed_BTD)
        attended = self.attend(qkv, context)
        del qkv, normed_BTD
        hidden_BTD = hidden_BTD + (yield Step(O, self.index, attended))
        del attended
        gate_up = yield Step(GATE_UP, self.index, self.post_attention_layernorm(hidden_BTD, empty))
        gate, up = gate_up.chunk(2, dim=-1)
        gated = torch.mul(self.activation(gate), up, out=empty(gate.shape, gate.dtype))
        del gate_up, gate, up
        return torch.add(hidden_BTD, (yield Step(DOWN, self.index, gated)), out=result)

    def attend(self, qkv: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Rotary attention over the cache: [B, T, Q + 2 K] to [B, T, Q]."""
        heads = (*qkv.shape[:-1], -1, self.head_dim)
        query_BTHd, key_BTGd, value_BTGd = (part.view(heads) for part in torch.split(qkv, self.widths, dim=-1))
        query_BHTd, key_BGTd = apply_rotary_pos_emb(
            query_BTHd.transpose(1, 2), key_BTGd.transpose(1, 2), *context.cos_sin
        )
        key_BGSd, value_BGSd = key_BGTd, value_BTGd.transpose(1, 2)
        if context.cache is not None:
            key_BGSd, value_BGSd = context.cache.update(key_BGSd, value_BGSd, self.index)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # noqa: SLF001 - transformers' own name for this public choice
            eager_attention_forward,
        )
        attended_BTHd, _ = attention(
            self, query_BHTd, key_BGSd, value_BGSd, context.mask, dropout=0.0, scaling=self.scaling
        )
        result: torch.Tensor = attended_BTHd.reshape(*qkv.shape[:-1], -1)
        return result


def decoder(
    layers: Sequence[DecoderLayer], hidden_BTD: torch.Tensor, context: AttentionContext, empty: Allocator
) -> Steps:
    """The forward of all layers: four steps each."""
    for layer in layers:
        hidden_BTD = yield from layer.steps(hidden_BTD, context, empty)
    return hidden_BTD
