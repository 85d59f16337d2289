"""What the trusted process holds of a model, and modules that stand for the two matrices that it may not hold.

Shape suffixes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaPreTrainedModel

from ..checkpoint import EMBEDDING, FINAL_NORM, LAYER_NORMS, layer_name
from ..decoder import DecoderLayer, RMSNorm
from ..errors import UnsupportedBySplit
from ..operations import Mode
from .remote import Remote, not_compiled
from .unsupported import SameWeights


class RemoteMatrix(nn.Module):
    """A module whose weights are the worker's: results can be asked for, the weights can't."""

    def __init__(self, remote: Remote, dtype: torch.dtype) -> None:
        super().__init__()
        self._remote = remote
        self._dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        raise UnsupportedBySplit(f"{type(self).__name__}.weight: the matrix is the worker's, and not here")


class RemoteEmbedding(RemoteMatrix):
    """The embedding where the worker looks tokens up."""

    @not_compiled  # type: ignore[untyped-decorator]
    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, D] of token ids."""
        return self._remote.embed(ids_BT.to(torch.int64)).to(self._dtype, copy=True)


class RemoteHead(RemoteMatrix):
    """The output matrix, which is the worker's in every split."""

    @not_compiled  # type: ignore[untyped-decorator]
    def forward(self, hidden_D: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D] after the final norm."""
        if torch.is_grad_enabled() and hidden_D.requires_grad:
            raise UnsupportedBySplit("a gradient is asked for of lm_head, and none crosses to the worker")
        rows_1ND = hidden_D.reshape(1, -1, hidden_D.shape[-1])
        logits_1NV = self._remote.lm_head(self._remote.place(rows_1ND)).to(self._dtype, copy=True)
        return logits_1NV.view(*hidden_D.shape[:-1], -1)


class TrustedPart(SameWeights, LlamaPreTrainedModel):  # type: ignore[misc]
    """The embedding and the norms.

    Callers may change ``config``, and transformers does so for a while; what a forward is made of is read from a copy.
    """

    def __init__(self, config: LlamaConfig, mode: Mode, remote: Remote) -> None:
        super().__init__(config)
        self.frozen_config = copy.deepcopy(config)
        self.embed_tokens = (
            RemoteEmbedding(remote, config.dtype)
            if mode is Mode.OP
            else nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        )
        own_layers = 0 if mode.worker_keeps_kv else config.num_hidden_layers
        self.layers = nn.ModuleList([DecoderLayer(self.frozen_config, index) for index in range(own_layers)])
        self.norm = None if mode is Mode.STACK else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    @staticmethod
    def weight_names(config: LlamaConfig, mode: Mode) -> list[str]:
        """The checkpoint's parameters that this part is made of."""
        layers = range(0 if mode.worker_keeps_kv else config.num_hidden_layers)
        first = [] if mode is Mode.OP else [EMBEDDING]
        last = [] if mode is Mode.STACK else [FINAL_NORM]
        return [*first, *last, *(layer_name(index, norm) for index in layers for norm in LAYER_NORMS)]

    def embed(self, source: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, D] of token ids; embeddings as they are."""
        embedded: torch.Tensor = source if source.is_floating_point() else self.embed_tokens(source)
        return embedded

    def forward(self, *_arguments: Any, **_kwargs: Any) -> torch.Tensor:
        raise UnsupportedBySplit(
            "model.model and get_decoder() can't be called: call the model itself, with output_hidden_states=True for "
            "hidden states"
        )
