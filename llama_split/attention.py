"""How queries meet keys and values: here, by an attention function of transformers, or in two steps of a worker.

Shape suffixes: B batch, T tokens, H heads, G key/value heads, S cached positions, d head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .operations import MIX, SCORES
from .steps import Step, Steps, Workspace


class AttentiveLayer(Protocol):
    """What an attention function reads of its layer."""

    index: int
    num_key_value_groups: int
    scaling: float


class Heads(NamedTuple):
    """Queries after rotation, and the keys and values that are cached by now."""

    query_BHTd: torch.Tensor
    key_BGSd: torch.Tensor
    value_BGSd: torch.Tensor


class Attention(ABC):
    """One way of attending. ``weights``, if there is a list, is given each layer's attention weights [B, H, T, S].

    ``takes_none`` says whether a mask of None is causal; where it isn't, it hides nothing.
    """

    takes_none: ClassVar[bool] = False

    def __init__(self, weights: list[torch.Tensor] | None = None) -> None:
        self.weights = weights

    @property
    def implementation(self) -> str:
        """The form of mask that it needs, in transformers' words: where weights are shown, "eager" as there."""
        return "sdpa" if self.weights is None else "eager"

    def prepare(self, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """A forward's mask as ``steps`` takes it: what is added to the scores, whichever form it came in.

        What a boolean mask hides gets minus infinity, or, where weights are shown, the least number of ``dtype``, as
        transformers' eager attention has it: there a token that sees nothing attends to all alike.
        """
        if mask is None or mask.dtype != torch.bool:
            return mask
        hidden = -torch.inf if self.weights is None else torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, hidden)

    @abstractmethod
    def steps(self, layer: AttentiveLayer, heads: Heads, mask: torch.Tensor | None, workspace: Workspace) -> Steps:
        """Attend: the result is [B, T, H, d] of any strides, in the dtype of the queries."""


class SdpaAttention(Attention):
    """torch's scaled_dot_product_attention, which never shows its weights and takes either form of mask."""

    takes_none = True
    _function: Callable[..., Any] = staticmethod(ALL_ATTENTION_FUNCTIONS["sdpa"])

    def prepare(self, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        return mask

    def steps(self, layer: AttentiveLayer, heads: Heads, mask: torch.Tensor | None, workspace: Workspace) -> Steps:
        yield from ()  # no step is needed
        attended_BTHd, _ = self._function(layer, *heads, mask, dropout=0.0, scaling=layer.scaling)
        attended: torch.Tensor = attended_BTHd
        return attended


class EagerAttention(Attention):
    """Two products and a softmax between them, here: for callers that want the weights."""

    def steps(self, layer: AttentiveLayer, heads: Heads, mask: torch.Tensor | None, workspace: Workspace) -> Steps:
        yield from ()  # no step is needed
        attended_BTHd, weights_BHTS = eager_attention_forward(layer, *heads, mask, dropout=0.0, scaling=layer.scaling)
        if self.weights is not None:
            self.weights.append(weights_BHTS)
        attended: torch.Tensor = attended_BTHd
        return attended


class RemoteAttention(Attention):
    """The same two products as steps; scaling, mask and softmax stay here."""

    def steps(self, layer: AttentiveLayer, heads: Heads, mask: torch.Tensor | None, workspace: Workspace) -> Steps:
        query_BHTd, key_BGSd, value_BGSd = heads
        dtype = query_BHTd.dtype
        keys_BHSd = _repeated(key_BGSd, layer.num_key_value_groups, workspace)
        product = yield Step(SCORES, layer.index, (workspace.place(query_BHTd), keys_BHSd))
        scores_BHTS = product.to(dtype) * layer.scaling
        del product, keys_BHSd
        if mask is not None:
            scores_BHTS += mask
        weights_BHTS = workspace.empty(scores_BHTS.shape)
        if weights_BHTS.dtype is torch.float32:
            torch.softmax(scores_BHTS, -1, dtype=torch.float32, out=weights_BHTS)
        else:
            weights_BHTS.copy_(torch.softmax(scores_BHTS, -1, dtype=torch.float32))
        if mask is not None:  # a token that sees nothing attends to nothing, as torch's attention has it
            weights_BHTS.masked_fill_(scores_BHTS.amax(-1, keepdim=True) == -torch.inf, 0)
        del scores_BHTS
        if self.weights is not None:
            self.weights.append(weights_BHTS.to(dtype, copy=True))
        values_BHSd = _repeated(value_BGSd, layer.num_key_value_groups, workspace)
        mixed_BHTd = yield Step(MIX, layer.index, (weights_BHTS, values_BHSd))
        return mixed_BHTd.to(dtype).transpose(1, 2)


def _repeated(states_BGSd: torch.Tensor, times: int, workspace: Workspace) -> torch.Tensor:
    """Each key/value head once for each of its query heads, made where it will be sent from: [B, H, S, d]."""
    batch, heads, length, width = states_BGSd.shape
    repeated_BHSd = workspace.empty((batch, heads * times, length, width))
    grouped = repeated_BHSd.view(batch, heads, times, length, width)
    grouped.copy_(states_BGSd[:, :, None].expand_as(grouped))
    return repeated_BHSd
