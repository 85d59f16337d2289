"""The part of a model that the trusted process holds, and stand-ins for matrices that only the worker holds.

Shape suffixes: B batch, T tokens, N tokens whose logits are asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaPreTrainedModel

from ..boundary.operations import Mode
from ..checkpoint.outline import trusted_names
from ..errors import UnsupportedBySplit
from ..model.decoder import DecoderLayer, RMSNorm
from .offload import Offload, not_compiled
from .unsupported import SameWeights


class RemoteMatrix(nn.Module):
    """A module whose weights are on the worker: it returns results, never the weights."""

    def __init__(self, offload: Offload, dtype: torch.dtype) -> None:
        super().__init__()
        self._offload = offload
        self._dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        raise UnsupportedBySplit(f"{type(self).__name__}.weight: the matrix is held by the worker, not by this process")


class RemoteEmbedding(RemoteMatrix):
    """The embedding in mode op, where the worker looks tokens up."""

    @not_compiled  # type: ignore[untyped-decorator]
    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, D] of token ids."""
        return self._offload.embed(ids_BT.to(torch.int64)).to(self._dtype, copy=True)


class RemoteHead(RemoteMatrix):
    """The output matrix, which the worker holds in every split."""

    @not_compiled  # type: ignore[untyped-decorator]
    def forward(self, hidden_D: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D] after the final norm."""
        if torch.is_grad_enabled() and hidden_D.requires_grad:
            raise UnsupportedBySplit("lm_head is asked for a gradient, and none crosses to the worker")
        rows_1ND = hidden_D.reshape(1, -1, hidden_D.shape[-1])
        logits_1NV = self._offload.lm_head(self._offload.last_workspace.place(rows_1ND)).to(self._dtype, copy=True)
        return logits_1NV.view(*hidden_D.shape[:-1], -1)


class TrustedPart(SameWeights, LlamaPreTrainedModel):  # type: ignore[misc]
    """The weights that this side holds: all but the matrices of the layers and the output matrix.

    In mode op the embedding is the worker's too, in mode layer the layers' norms, in mode stack all norms. Callers may
    change ``config``, and transformers does so temporarily; forwards therefore read ``frozen_config``, a copy.

    Args:
        config: the model's configuration.
        mode: the split.
        offload: executes operations on the worker.
    """

    def __init__(self, config: LlamaConfig, mode: Mode, offload: Offload) -> None:
        super().__init__(config)
        self.frozen_config = copy.deepcopy(config)
        self.embed_tokens = (
            RemoteEmbedding(offload, config.dtype)
            if mode is Mode.OP
            else nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        )
        own_layers = 0 if mode.worker_keeps_kv else config.num_hidden_layers
        self.layers = nn.ModuleList([DecoderLayer(self.frozen_config, index) for index in range(own_layers)])
        self.norm = None if mode is Mode.STACK else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    @staticmethod
    def weight_names(config: LlamaConfig, mode: Mode) -> list[str]:
        """The names of the checkpoint's parameters that this side loads."""
        return trusted_names(config.num_hidden_layers, mode)

    def embed(self, source: torch.Tensor) -> torch.Tensor:
        """The embeddings [B, T, D] of token ids [B, T]; embeddings are returned as they are."""
        embedded: torch.Tensor = source if source.is_floating_point() else self.embed_tokens(source)
        return embedded

    def forward(self, *_arguments: Any, **_kwargs: Any) -> torch.Tensor:
        raise UnsupportedBySplit(
            "model.model and get_decoder() can't be called: call the model itself, with output_hidden_states=True for "
            "hidden states"
        )
