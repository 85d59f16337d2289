"""Forwards of the splits where this side attends and keeps the KV: op and fused.

Shape suffixes: B batch, T tokens, S all tokens attended to, H heads, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from transformers import Cache

from ..boundary.operations import Mode
from ..model.attention import Attention, EagerAttention, OffloadedAttention, SdpaAttention
from ..model.decoder import AttentionContext, DecoderLayer, decoder
from ..model.kv_cache import GrowingCache
from ..model.masks import causal_mask
from ..model.program import Program, execute
from ..model.rotary import Rotary
from .history import ForwardInput
from .offload import Offload
from .outputs import RequestedOutputs
from .paged import PagedCache
from .part import TrustedPart
from .pipeline import execute_in_turn, split_prompt
from .workers import Workers


class LocalForwards:
    """Runs all decoder layers on this side, with their matrix products offloaded to the worker.

    Args:
        part: the weights of this side.
        mode: op or fused; op offloads the products of attention as well.
        workers: hold the matrices.
        offload: executes operations on the workers.
        pipeline: the most chunks of a prompt in flight at once at a worker.
    """

    def __init__(self, part: TrustedPart, mode: Mode, workers: Workers, offload: Offload, pipeline: int) -> None:
        self._part = part
        self._mode = mode
        self._workers = workers
        self._offload = offload
        self._pipeline = pipeline
        self._rotary = Rotary(part.frozen_config, torch.device("cpu"))

    def layers(self, tokens: ForwardInput, cache: Cache | None, requested: RequestedOutputs) -> torch.Tensor:
        """All decoder layers: hidden states [B, T, D] before the final norm.

        Args:
            tokens: the input.
            cache: the KV cache to continue; None: the forward keeps no KV.
            requested: collects hidden states and attention weights.
        """
        hidden_BTD = self._part.embed(tokens.source)
        requested.add([hidden_BTD])
        chunks = self._chunks(tokens, cache, requested)
        context = self._context(tokens, hidden_BTD, cache, requested.attentions, whole=len(chunks) == 1)
        if len(chunks) == 1:
            return execute(self._program(hidden_BTD, context, requested), self._offload.execute)
        past = 0 if cache is None else cache.get_seq_length()
        programs = [self._program(hidden_BTD[:, one], context.chunk(one, past), requested) for one in chunks]
        results = execute_in_turn(programs, self._offload.begin, self._workers.of, self._pipeline)
        return torch.cat(results, dim=1)

    def batch(self, tokens: ForwardInput, mask: torch.Tensor | None, cache: PagedCache) -> torch.Tensor:
        """All decoder layers for the tokens of several requests in one row: hidden states before the final norm.

        Args:
            tokens: the input; its mask is not looked at.
            mask: what each token may attend to, [1, 1, T, S], boolean or added to the scores.
            cache: where the requests' keys and values are.
        """
        hidden_BTD = self._part.embed(tokens.source)
        attention = self._attention(None)
        cos_sin = self._rotary(tokens.positions, hidden_BTD.dtype, tokens.lengths)
        context = AttentionContext(cos_sin, attention.prepare(mask, hidden_BTD.dtype), cache, attention)
        return execute(
            self._program(hidden_BTD, context, RequestedOutputs(hidden_states=False, attentions=False)),
            self._offload.execute,
        )

    def _chunks(self, tokens: ForwardInput, cache: Cache | None, requested: RequestedOutputs) -> list[slice]:
        """The chunks that are executed in turn; one where the forward can't be split.

        Requested outputs cover whole forwards. A chunk finds earlier chunks only in a cache that grows. It must not
        attend to later chunks, which a mask that the caller has prepared may ask for.
        """
        prepared = tokens.mask is not None and tokens.mask.dim() == 4
        whole = requested.anything or prepared or not isinstance(cache, GrowingCache)
        chunks = 1 if whole or self._pipeline == 1 else self._pipeline * len(self._workers)
        return split_prompt(tokens.source.shape[1], chunks)

    def _context(
        self,
        tokens: ForwardInput,
        hidden_BTD: torch.Tensor,
        cache: Cache | None,
        weights: list[torch.Tensor] | None,
        *,
        whole: bool,
    ) -> AttentionContext:
        """What all layers share; only a forward that stays ``whole`` can do without a mask."""
        attention = self._attention(weights)
        config = self._part.frozen_config
        if config._attn_implementation != attention.implementation:  # noqa: SLF001 - transformers' name for it
            config = copy.copy(config)
            config._attn_implementation = attention.implementation  # noqa: SLF001
        mask = causal_mask(
            config,
            hidden_BTD,
            tokens.mask,
            cache,
            sequences_BS=tokens.sequences,
            may_be_none=whole and (attention.takes_none or hidden_BTD.shape[1] == 1),
        )
        cos_sin = self._rotary(tokens.positions, hidden_BTD.dtype, tokens.lengths)
        return AttentionContext(cos_sin, attention.prepare(mask, hidden_BTD.dtype), cache, attention)

    def _attention(self, weights: list[torch.Tensor] | None) -> Attention:
        if self._mode is Mode.OP:
            return OffloadedAttention(weights)
        return SdpaAttention() if weights is None else EagerAttention(weights)

    def _program(self, hidden_BTD: torch.Tensor, context: AttentionContext, requested: RequestedOutputs) -> Program:
        layers = cast("Sequence[DecoderLayer]", self._part.layers)
        return decoder(layers, hidden_BTD, context, self._offload.workspaces, lambda hidden: requested.add([hidden]))
