"""The arithmetic of a decoder layer, written once for every split.

A layer is a program: it yields each product with a weight matrix as a ``WorkerOp`` and is sent the result. The trusted
side executes it by sending the operations to the worker; the worker's ``layer`` and ``stack`` operations execute it
with their own weights.

Shape suffixes: B batch, T tokens, D hidden, H heads, G key/value heads, S cached positions, d head_dim, P query and key
and value widths together, Q query width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from ..boundary.geometry import Geometry
from ..boundary.operations import DOWN, GATE_UP, OUT_PROJ, QKV
from .attention import Attention, QueryKeyValue
from .program import Program, WorkerOp, Workspace
from .rotary import rotate


class KeysAndValues(Protocol):
    """What a layer needs of a KV cache, transformers' or another."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values [B, G, T, d]; return all that the layer attends to, [B, G, S, d]."""


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward share: what ``rotate`` takes, mask, KV cache and way of attending.

    A ``mask`` of None means causal where ``attention.takes_none``; elsewhere it hides nothing.
    """

    cos_sin: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    cache: KeysAndValues | None
    attention: Attention

    def chunk(self, tokens: slice, past: int) -> AttentionContext:
        """The context of some of the forward's tokens, which starts after ``past`` cached ones.

        Raises:
            ValueError: the forward has no mask to take a part of.
        """
        if self.mask is None:
            raise ValueError("a chunk of a forward needs the forward's mask")
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
    """A layer without its weight matrices: two norms, rotary attention, the gated activation and the residuals."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        geometry = Geometry.of(config)
        self.input_layernorm = RMSNorm(geometry.hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(geometry.hidden, config.rms_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.index = index
        self.heads = [geometry.heads, geometry.kv_heads]
        self.head_dim = geometry.head_dim
        # transformers' attention functions read these.
        self.config = config
        self.num_key_value_groups = geometry.heads // geometry.kv_heads
        self.scaling = geometry.head_dim**-0.5
        self.is_causal = True

    def program(
        self,
        hidden_BTD: torch.Tensor,
        context: AttentionContext,
        workspace: Workspace,
        result: torch.Tensor | None = None,
    ) -> Program:
        """The forward of this layer: [B, T, D] to [B, T, D].

        Args:
            hidden_BTD: hidden states after the previous layer.
            context: what all layers of the forward share.
            workspace: where the arguments of operations are written.
            result: memory for the result, [B, T, D]; None: allocate it.
        """
        dtype = hidden_BTD.dtype
        qkv_BTP = (yield WorkerOp(QKV, self.index, (self.input_layernorm(hidden_BTD, workspace),))).to(dtype)
        attended_BTQ = yield from self.attend(qkv_BTP, context, workspace)
        del qkv_BTP  # borrowed results go back to the arena as soon as they have been used
        hidden_BTD = hidden_BTD + (yield WorkerOp(OUT_PROJ, self.index, (attended_BTQ,))).to(dtype)
        del attended_BTQ
        normed_BTD = self.post_attention_layernorm(hidden_BTD, workspace)
        gate_up = (yield WorkerOp(GATE_UP, self.index, (normed_BTD,))).to(dtype)
        gate_BTI, up_BTI = gate_up.chunk(2, dim=-1)
        gated_BTI = torch.mul(self.activation(gate_BTI), up_BTI, out=workspace.empty(gate_BTI.shape))
        del gate_up, gate_BTI, up_BTI, normed_BTD
        return torch.add(hidden_BTD, (yield WorkerOp(DOWN, self.index, (gated_BTI,))).to(dtype), out=result)

    def attend(self, qkv_BTP: torch.Tensor, context: AttentionContext, workspace: Workspace) -> Program:
        """Rotary attention over the cache: [B, T, P] to an argument [B, T, Q].

        Args:
            qkv_BTP: query, key and value side by side.
            context: what all layers of the forward share.
            workspace: where the arguments of operations are written.
        """
        heads_BTHd = qkv_BTP.view(*qkv_BTP.shape[:-1], -1, self.head_dim)
        turned = sum(self.heads)  # queries and keys; values follow
        rotated_BTHd = rotate(heads_BTHd[:, :, :turned], context.cos_sin)
        query_BHTd, key_BGSd = torch.split(rotated_BTHd.transpose(1, 2), self.heads, dim=1)
        value_BGSd = heads_BTHd[:, :, turned:].transpose(1, 2)
        if context.cache is not None:
            key_BGSd, value_BGSd = context.cache.update(key_BGSd, value_BGSd, self.index)
        attended_BTHd = yield from context.attention.program(
            self, QueryKeyValue(query_BHTd, key_BGSd, value_BGSd), context.mask, workspace
        )
        return workspace.place(attended_BTHd).view(*qkv_BTP.shape[:-1], -1)


def decoder(
    layers: Sequence[DecoderLayer],
    hidden_BTD: torch.Tensor,
    context: AttentionContext,
    workspaces: Sequence[Workspace],
    on_layer: Callable[[torch.Tensor], None] = lambda _hidden_BTD: None,
) -> Program:
    """The forward of all layers: [B, T, D] to [B, T, D].

    Args:
        layers: the layers, first to last.
        hidden_BTD: the embeddings.
        context: what all layers of the forward share.
        workspaces: for each layer, where the arguments of its operations are written.
        on_layer: called with the result of each layer.
    """
    for layer, workspace in zip(layers, workspaces, strict=True):
        hidden_BTD = yield from layer.program(hidden_BTD, context, workspace)
        on_layer(hidden_BTD)
    return hidden_BTD
