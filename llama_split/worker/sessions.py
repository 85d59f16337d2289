"""KV caches that the worker keeps for its clients: one session a client and generation.

Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import torch
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..cache import GrowingCache
from ..decoder import AttentionContext
from .kernels import Weights

MAX_SESSIONS_PER_CLIENT = 64


class Session:
    """One generation's KV cache, and what the layers of the forward in progress share."""

    def __init__(self, weights: Weights, rotary: LlamaRotaryEmbedding) -> None:
        self._weights = weights
        self._rotary = rotary
        self.cache = GrowingCache(weights.geometry.layers)
        self._context: AttentionContext | None = None
        self._next_layer = 0

    def begin(
        self,
        hidden_BTD: torch.Tensor,
        positions: torch.Tensor,
        padding: torch.Tensor | None,
        past: int,
        select: torch.Tensor | None,
    ) -> None:
        """Start a forward after ``past`` cached tokens; later ones are forgotten.

        ``positions`` [B, T] int64; ``padding`` [B, past + T], false or 0 where a token is padding; ``select`` [B] are
        the rows of the present batch to go on with. All three are read once, into private memory.

        Raises:
            ValueError: they don't fit the cache or each other.
        """
        batch, tokens = hidden_BTD.shape[:2]
        held = min(layer.get_seq_length() for layer in self.cache.layers)  # a forward may have ended half-way
        positions_limit = self._weights.config.max_position_embeddings
        if past + tokens > positions_limit:
            raise ValueError(f"{past + tokens} tokens are to be cached; the model has {positions_limit} positions")
        if not 0 <= past <= held:
            raise ValueError(f"the forward starts after {past} tokens; this session has {held}")
        if positions.shape not in ((batch, tokens), (1, tokens)) or positions.dtype != torch.int64:
            raise ValueError(
                f"positions are {list(positions.shape)} of {positions.dtype}; the batch is {batch} × {tokens}"
            )
        if padding is not None and padding.shape != (batch, past + tokens):
            raise ValueError(f"the mask is {list(padding.shape)}, not {batch} × {past + tokens}")
        self.cache.truncate(past)
        if select is not None:
            self._select(select.clone(), batch)
        device = self._weights.device
        private = positions.to(device, copy=True)
        mask = create_causal_mask(
            config=self._weights.config,
            inputs_embeds=hidden_BTD,
            attention_mask=None if padding is None else padding.to(device, copy=True),
            past_key_values=self.cache,
            position_ids=private,
        )
        self._context = AttentionContext(self._rotary(hidden_BTD, private), mask, self.cache)
        self._next_layer = 0

    def enter(self, index: int) -> AttentionContext:
        """The context for layer ``index``, which must be the next one of the forward in progress.

        Raises:
            ValueError: it is not.
        """
        if self._context is None or index != self._next_layer:
            raise ValueError(f"layer {index} is asked for; the forward in progress is at layer {self._next_layer}")
        self._next_layer += 1
        return self._context

    def _select(self, rows: torch.Tensor, batch: int) -> None:
        held = self.cache.layers[0].keys.shape[0] if self.cache.get_seq_length() else 0
        if rows.dtype != torch.int64 or rows.shape != (batch,) or not all(0 <= row < held for row in rows.tolist()):
            raise ValueError(f"rows to go on with must be {batch} numbers below {held}")
        self.cache.select(rows)


class Sessions:
    """All sessions, by connection and the client's own number."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._rotary = LlamaRotaryEmbedding(weights.config).to(weights.device)
        self._sessions: dict[tuple[int, int], Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, connection: int, number: int) -> Session:
        """The session of this number, made if it is new.

        Raises:
            ValueError: the client has too many.
        """
        key = (connection, number)
        if key not in self._sessions:
            if sum(owner == connection for owner, _ in self._sessions) >= MAX_SESSIONS_PER_CLIENT:
                raise ValueError(f"this client has {MAX_SESSIONS_PER_CLIENT} KV sessions, the most that one may have")
            self._sessions[key] = Session(self._weights, self._rotary)
        return self._sessions[key]

    def end(self, connection: int, number: int) -> None:
        """Free one session; one that never began is no error."""
        self._sessions.pop((connection, number), None)

    def end_connection(self, connection: int) -> None:
        """Free all sessions of a client that has gone."""
        for key in [key for key in self._sessions if key[0] == connection]:
            del self._sessions[key]
