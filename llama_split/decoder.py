"""A decoder layer's arithmetic, written once for every split.

A forward is a generator: it yields each product with a weight matrix as a ``Step`` and is sent the result. Who runs
it decides where the product is made: the trusted side sends steps to the worker, the worker's ``layer`` and ``stack``
operations make them themselves.

Shape suffixes: B batch, T tokens, D hidden, H heads, G key/value heads, S cached positions, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .attention import Attention, Heads
from .operations import DOWN, GATE_UP, QKV, Geometry, O
from .steps import Step, Steps, Workspace


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward share: rotary cosines and sines, the mask (None: causal), the KV cache."""

    cos_sin: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    cache: Cache | None
    attention: Attention

    def part(self, tokens: slice, past: int) -> AttentionContext:
        """That of some of the tokens, which attend to those before them, of a forward after ``past`` cached ones."""
        if self.mask is None:
            raise ValueError("a part of a forward needs the forward's mask")
        cos, sin = self.cos_sin
        mask = self.mask[:, :, tokens, : past + tokens.stop]
        return AttentionContext((cos[:, tokens], sin[:, tokens]), mask, self.cache, self.attention)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), accumulated in float32 as transformers does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, hidden_BTD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        wide_BTD = hidden_BTD.to(torch.float32)
        variance_BT1 = wide_BTD.pow(2).mean(-1, keepdim=True)
        normed_BTD = (wide_BTD * torch.rsqrt(variance_BT1 + self.eps)).to(hidden_BTD.dtype)
        return torch.mul(self.weight, normed_BTD, out=workspace.empty(normed_BTD.shape))


class DecoderLayer(nn.Module):
    """The part of a layer that has no weight matrix: two norms, rotary attention, the gated activation, residuals."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        geometry = Geometry.of(config)
        self.input_layernorm = RMSNorm(geometry.hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(geometry.hidden, config.rms_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.index = index
        self.widths = [geometry.query_width, geometry.kv_width, geometry.kv_width]
        self.head_dim = geometry.head_dim
        # Read by the attention functions of transformers.
        self.config = config
        self.num_key_value_groups = geometry.heads // geometry.kv_heads
        self.scaling = geometry.head_dim**-0.5
        self.is_causal = True

    def steps(
        self,
        hidden_BTD: torch.Tensor,
        context: AttentionContext,
        workspace: Workspace,
        result: torch.Tensor | None = None,
    ) -> Steps:
        """This layer's forward. Arguments of steps are made in ``workspace``, the result in ``result``."""
        dtype = hidden_BTD.dtype
        qkv = (yield Step(QKV, self.index, (self.input_layernorm(hidden_BTD, workspace),))).to(dtype)
        attended = yield from self.attend(qkv, context, workspace)
        del qkv
        hidden_BTD = hidden_BTD + (yield Step(O, self.index, (attended,))).to(dtype)
        del attended
        normed_BTD = self.post_attention_layernorm(hidden_BTD, workspace)
        gate_up = (yield Step(GATE_UP, self.index, (normed_BTD,))).to(dtype)
        gate, up = gate_up.chunk(2, dim=-1)
        gated = torch.mul(self.activation(gate), up, out=workspace.empty(gate.shape))
        del gate_up, gate, up, normed_BTD
        return torch.add(hidden_BTD, (yield Step(DOWN, self.index, (gated,))).to(dtype), out=result)

    def attend(self, qkv: torch.Tensor, context: AttentionContext, workspace: Workspace) -> Steps:
        """Rotary attention over the cache: [B, T, Q + 2 K] to an argument [B, T, Q]."""
        heads = (*qkv.shape[:-1], -1, self.head_dim)
        query_BTHd, key_BTGd, value_BTGd = (part.view(heads) for part in torch.split(qkv, self.widths, dim=-1))
        query_BHTd, key_BGTd = apply_rotary_pos_emb(
            query_BTHd.transpose(1, 2), key_BTGd.transpose(1, 2), *context.cos_sin
        )
        key_BGSd, value_BGSd = key_BGTd, value_BTGd.transpose(1, 2)
        if context.cache is not None:
            key_BGSd, value_BGSd = context.cache.update(key_BGSd, value_BGSd, self.index)
        attended_BTHd = yield from context.attention.steps(
            self, Heads(query_BHTd, key_BGSd, value_BGSd), context.mask, workspace
        )
        return workspace.place(attended_BTHd).view(*qkv.shape[:-1], -1)


def decoder(
    layers: Sequence[DecoderLayer],
    hidden_BTD: torch.Tensor,
    context: AttentionContext,
    workspace: Workspace,
    on_layer: Callable[[torch.Tensor], None] = lambda _hidden_BTD: None,
) -> Steps:
    """The forward of all layers; ``on_layer`` is shown each one's result."""
    for layer in layers:
        hidden_BTD = yield from layer.steps(hidden_BTD, context, workspace)
        on_layer(hidden_BTD)
    return hidden_BTD
