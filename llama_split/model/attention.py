"""Ways of attending: in this process by transformers' functions, or with both products offloaded to a worker.

Shape suffixes: B batch, T tokens, H heads, G key/value heads, S cached positions, d head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..boundary.operations import MIX, SCORES
from .program import Program, WorkerOp, Workspace


class AttentiveLayer(Protocol):
    """What an attention function reads from its layer."""

    index: int
    num_key_value_groups: int
    scaling: float


class QueryKeyValue(NamedTuple):
    """Rotated queries, and all keys and values cached so far, those of this forward included."""

    query_BHTd: torch.Tensor
    key_BGSd: torch.Tensor
    value_BGSd: torch.Tensor


class Attention(ABC):
    """One way of attending.

    ``takes_none`` is true where a mask of None means causal; elsewhere None hides nothing.

    Args:
        weights: a list to which each layer's attention weights [B, H, T, S] are appended; None: they are dropped.
    """

    takes_none: ClassVar[bool] = False

    def __init__(self, weights: list[torch.Tensor] | None = None) -> None:
        self.weights = weights

    @property
    def implementation(self) -> str:
        """The form of mask it takes, by transformers' name; "eager" where weights are wanted, as in transformers."""
        return "sdpa" if self.weights is None else "eager"

    def prepare(self, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Convert a forward's mask of either form to the one that ``program`` takes: numbers added to the scores.

        What a boolean mask hides gets minus infinity; where weights are wanted, the least number of ``dtype`` instead.
        That is what transformers' eager attention does: a token that sees nothing attends to everything equally.
        """
        if mask is None or mask.dtype != torch.bool:
            return mask
        hidden = -torch.inf if self.weights is None else torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, hidden)

    @abstractmethod
    def program(
        self, layer: AttentiveLayer, heads: QueryKeyValue, mask: torch.Tensor | None, workspace: Workspace
    ) -> Program:
        """Attend: to [B, T, H, d] with any strides, in the dtype of the queries.

        Args:
            layer: the layer that attends.
            heads: its queries, keys and values.
            mask: as ``prepare`` returns it.
            workspace: where the arguments of operations are written.
        """


class SdpaAttention(Attention):
    """torch's scaled_dot_product_attention: never returns its weights, takes either form of mask."""

    takes_none = True
    _function: Callable[..., Any] = staticmethod(ALL_ATTENTION_FUNCTIONS["sdpa"])

    def prepare(self, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        return mask

    def program(
        self, layer: AttentiveLayer, heads: QueryKeyValue, mask: torch.Tensor | None, workspace: Workspace
    ) -> Program:
        yield from ()  # a program without operations
        attended_BTHd, _ = self._function(layer, *heads, mask, dropout=0.0, scaling=layer.scaling)
        attended: torch.Tensor = attended_BTHd
        return attended


class EagerAttention(Attention):
    """Two products and a softmax between them, in this process: for callers that want the weights."""

    def program(
        self, layer: AttentiveLayer, heads: QueryKeyValue, mask: torch.Tensor | None, workspace: Workspace
    ) -> Program:
        yield from ()  # a program without operations
        attended_BTHd, weights_BHTS = eager_attention_forward(layer, *heads, mask, dropout=0.0, scaling=layer.scaling)
        if self.weights is not None:
            self.weights.append(weights_BHTS)
        attended: torch.Tensor = attended_BTHd
        return attended


class OffloadedAttention(Attention):
    """Both products are operations of the worker; scaling, mask and softmax stay in this process."""

    def program(
        self, layer: AttentiveLayer, heads: QueryKeyValue, mask: torch.Tensor | None, workspace: Workspace
    ) -> Program:
        query_BHTd, key_BGSd, value_BGSd = heads
        dtype = query_BHTd.dtype
        keys_BHSd = _repeated(key_BGSd, layer.num_key_value_groups, workspace)
        product = yield WorkerOp(SCORES, layer.index, (workspace.place(query_BHTd), keys_BHSd))
        scores_BHTS = product.to(dtype) * layer.scaling
        del product, keys_BHSd
        if mask is not None:
            scores_BHTS += mask
        weights_BHTS = workspace.empty(scores_BHTS.shape)
        if weights_BHTS.dtype is torch.float32:
            torch.softmax(scores_BHTS, -1, dtype=torch.float32, out=weights_BHTS)
        else:
            weights_BHTS.copy_(torch.softmax(scores_BHTS, -1, dtype=torch.float32))
        if mask is not None:  # a token that sees nothing attends to nothing, as in torch's attention
            weights_BHTS.masked_fill_(scores_BHTS.amax(-1, keepdim=True) == -torch.inf, 0)
        del scores_BHTS
        if self.weights is not None:
            self.weights.append(weights_BHTS.to(dtype, copy=True))
        values_BHSd = _repeated(value_BGSd, layer.num_key_value_groups, workspace)
        mixed_BHTd = yield WorkerOp(MIX, layer.index, (weights_BHTS, values_BHSd))
        return mixed_BHTd.to(dtype).transpose(1, 2)


def _repeated(states_BGSd: torch.Tensor, times: int, workspace: Workspace) -> torch.Tensor:
    """Repeat each key/value head for all of its query heads, in memory that can be sent: [B, H, S, d]."""
    batch, heads, length, width = states_BGSd.shape
    repeated_BHSd = workspace.empty((batch, heads * times, length, width))
    grouped = repeated_BHSd.view(batch, heads, times, length, width)
    grouped.copy_(states_BGSd[:, :, None].expand_as(grouped))
    return repeated_BHSd
