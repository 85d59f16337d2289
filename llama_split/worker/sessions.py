"""KV caches that the worker keeps for its clients: one session for each of a client's caches, within limits.

A session that has been idle for long ends when its memory is needed; its client rebuilds it if it returns.

Shape suffixes: B batch, T tokens of this forward, S all tokens cached after it, D hidden.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from shmtransport.units import size_text

from ..errors import SessionLimit, SessionLost
from ..model.attention import SdpaAttention
from ..model.decoder import AttentionContext
from ..model.kv_cache import GrowingCache
from ..model.masks import causal_mask
from ..model.rotary import Rotary
from .weights import Weights

logger = logging.getLogger("llama_split")

_MAX_MASK_BYTES = 1 << 30  # a byte for each pair of a new token and one that it may attend to


@dataclass(frozen=True)
class SessionLimits:
    """The limits on sessions.

    Attributes:
        max_sessions: the most sessions of all clients together.
        max_sessions_per_client: the most sessions of one client.
        max_kv_bytes: the most bytes of KV of all clients together. None: half of the memory of the worker's device.
        idle_s: seconds without use after which a session may be ended in favour of another.
    """

    max_sessions: int = 256
    max_sessions_per_client: int = 64
    max_kv_bytes: int | None = None
    idle_s: float = 600.0

    def kv_bytes(self, device: torch.device) -> int:
        """The limit on bytes of KV that applies on this device."""
        if self.max_kv_bytes is not None:
            return self.max_kv_bytes
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory // 2
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Session:
    """One KV cache, and what the layers of the forward in progress share.

    Args:
        weights: the model.
        rotary: computes rotary positions; shared by all sessions.
        make_room: called with the session and the bytes of KV that it needs; raises ``SessionLimit``.
    """

    def __init__(self, weights: Weights, rotary: Rotary, make_room: Callable[[Session, int], None]) -> None:
        self._weights = weights
        self._rotary = rotary
        self._make_room = make_room
        self.cache = GrowingCache(len(weights.layers))
        self.kv_bytes = 0
        self.last_used = time.monotonic()
        self._context: AttentionContext | None = None
        self._next_layer = 0

    def begin(
        self,
        hidden_BTD: torch.Tensor,
        positions: torch.Tensor,
        padding: torch.Tensor | None,
        past: int,
        select: torch.Tensor | None,
        reserve: int = 0,
        lengths: torch.Tensor | None = None,
        sequences: torch.Tensor | None = None,
    ) -> None:
        """Start a forward. All tensors but ``hidden_BTD`` are copied to private memory before they are used.

        Args:
            hidden_BTD: the embeddings; only their shape and dtype matter here.
            positions: [B or 1, T] int64.
            padding: [B, S] bool, false where a token is padding. None: every token counts.
            past: how many cached tokens the forward continues; later ones are dropped.
            select: [B] int64, the rows of the cached batch to continue with. None: all.
            reserve: how many tokens a row is expected to have in the end.
            lengths: [T] int64, the length of the text when each token was first processed; for models whose rotary
                frequencies depend on it.
            sequences: [B, S] int64, the index of each token's text where several are packed into a row.

        Raises:
            ValueError: the arguments don't fit the cache or each other.
            SessionLost: the session has fewer than ``past`` tokens.
            SessionLimit: there is no room for the KV.
        """
        batch, tokens = hidden_BTD.shape[:2]
        held = min(layer.get_seq_length() for layer in self.cache.layers)  # a forward may have ended between two layers
        if not (type(past) is type(reserve) is int and past >= 0):
            raise ValueError(f"past is {past} and reserve is {reserve}; both must be whole numbers, past 0 or more")
        if batch * tokens == 0:
            raise ValueError(f"a forward needs tokens; the batch is {batch} × {tokens}")
        if past > held:
            raise SessionLost(f"the forward starts after {past} tokens; this session has {held}")
        end = past + tokens
        if tokens > 1 and batch * tokens * end > _MAX_MASK_BYTES:
            raise ValueError(
                f"the mask of {batch} × {tokens} tokens over {end} exceeds {size_text(_MAX_MASK_BYTES)}: "
                "send fewer tokens at once, by a smaller arena_bytes or prefill_chunk_size"
            )
        device = self._weights.device
        rows = (1, tokens) if positions.shape[0] == 1 else (batch, tokens)
        own_positions = _private("positions", positions, rows, torch.int64, device)
        own_padding = _private("padding", padding, (batch, end), torch.bool, device)
        own_sequences = _private("sequences", sequences, (batch, end), torch.int64, device)
        own_lengths = _private("lengths", lengths, (tokens,), torch.int64, torch.device("cpu"))
        cos_sin = self._rotary(own_positions, hidden_BTD.dtype, own_lengths)
        self._context = None
        self.last_used = time.monotonic()
        self.cache.rewind(past)
        selected = self._rows(select, batch)
        self._reserve(batch, end, min(reserve, self._weights.config.max_position_embeddings))
        if selected is not None:  # only now, since it allocates
            self.cache.select(selected)
        mask = causal_mask(self._weights.config, hidden_BTD, own_padding, self.cache, sequences_BS=own_sequences)
        self._context = AttentionContext(cos_sin, mask, self.cache, SdpaAttention())
        self._next_layer = 0

    def enter(self, index: int) -> AttentionContext:
        """Return the context for a layer, which must be the next one of the forward in progress.

        Args:
            index: the layer's position among those that this worker holds.

        Raises:
            SessionLost: no forward is in progress.
            ValueError: another layer is next.
        """
        if self._context is None:
            raise SessionLost(f"layer {index} is asked for, and no forward is in progress in this session")
        if index != self._next_layer:
            raise ValueError(f"layer {index} is asked for; the forward in progress is at layer {self._next_layer}")
        self._next_layer += 1
        self.last_used = time.monotonic()
        return self._context

    def _reserve(self, batch: int, length: int, reserve: int) -> None:
        """Make room for the KV of ``reserve`` tokens per row, or of ``length`` ones if those don't fit.

        Raises:
            SessionLimit: there is no room even for ``length`` tokens.
        """
        geometry = self._weights.geometry
        token_bytes = 2 * len(self.cache.layers) * geometry.kv_width * self._weights.dtype.itemsize
        for wanted in (reserve, 0) if reserve > length else (0,):
            self.cache.reserve(wanted)
            nbytes = batch * self.cache.layers[0].capacity_for(batch, length) * token_bytes
            try:
                self._make_room(self, nbytes)
            except SessionLimit:
                if wanted == 0:
                    raise
            else:
                self.kv_bytes = nbytes
                return

    def _rows(self, select: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """The rows to continue with, in private memory; None where the batch stays the same or starts over.

        Raises:
            ValueError: they are not rows of this batch, or the batch changes and none are given.
        """
        held = self.cache.batch
        if self.cache.get_seq_length() == 0:
            if held != batch:
                self.cache.reset()  # free the buffers of the other size
            held = 0
        if select is None:
            if held not in (0, batch):
                raise ValueError(f"the session holds a batch of {held}; the forward has one of {batch}")
            return None
        rows = select.clone()
        if rows.dtype != torch.int64 or rows.shape != (batch,) or not all(0 <= row < held for row in rows.tolist()):
            raise ValueError(f"the selected rows must be {batch} int64 numbers below {held}")
        return rows


def _private(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Any:
    """Copy a client's tensor to memory that the client can't change; None stays None.

    Args:
        name: what the tensor is, for the error.
        tensor: the client's tensor.
        shape: the shape that it must have.
        dtype: the dtype that it must have.
        device: where to copy it.

    Raises:
        ValueError: it has another shape or dtype.
    """
    if tensor is None:
        return None
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {list(tensor.shape)} of {tensor.dtype}; it must be {list(shape)} of {dtype}")
    return tensor.to(device, copy=True)


class Sessions:
    """All sessions, by connection and by the id that the client has chosen."""

    def __init__(self, weights: Weights, limits: SessionLimits | None = None) -> None:
        self._weights = weights
        self._limits = SessionLimits() if limits is None else limits
        self._kv_limit = self._limits.kv_bytes(weights.device)
        self._rotary = Rotary(weights.config, weights.device)
        self._sessions: dict[tuple[int, int], Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def most_per_client(self) -> int:
        """The most sessions of one client, if there are no others."""
        return min(self._limits.max_sessions_per_client, self._limits.max_sessions)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV granted to sessions."""
        return sum(session.kv_bytes for session in self._sessions.values())

    def open(self, connection_id: int, session_id: int) -> Session:
        """Return a client's session, created if it is new.

        Raises:
            SessionLimit: there are too many sessions.
        """
        key = (connection_id, session_id)
        session = self._sessions.get(key)
        if session is None:
            limits = self._limits
            if sum(owner == connection_id for owner, _ in self._sessions) >= limits.max_sessions_per_client:
                raise SessionLimit(
                    f"this client has {limits.max_sessions_per_client} KV sessions, the most that one may have: drop "
                    "caches that you don't need"
                )
            while len(self._sessions) >= limits.max_sessions:
                self._end_idle(
                    None,
                    f"the worker has {len(self._sessions)} KV sessions, the most that it keeps, and none was idle for "
                    f"{limits.idle_s:g} s: try again later, or raise --max-sessions",
                )
            session = self._sessions[key] = Session(self._weights, self._rotary, self._make_room)
        return session

    def end(self, connection_id: int, session_id: int) -> None:
        """Free one session; does nothing if it was never created."""
        self._sessions.pop((connection_id, session_id), None)

    def end_connection(self, connection_id: int) -> None:
        """Free all sessions of a client that has disconnected."""
        for key in [key for key in self._sessions if key[0] == connection_id]:
            del self._sessions[key]

    def _make_room(self, session: Session, nbytes: int) -> None:
        """Make sure that a session may have ``nbytes`` bytes of KV; ends idle sessions for that.

        Raises:
            SessionLimit: that exceeds the limit, or other sessions hold too much and are not idle.
        """
        if nbytes > self._kv_limit:  # ending other sessions can't help
            raise SessionLimit(
                f"this forward needs {size_text(nbytes)} of KV, and the limit is {size_text(self._kv_limit)}: use a "
                "shorter text or smaller batch, or raise --max-kv-bytes"
            )
        while (others := self.kv_bytes - session.kv_bytes) + nbytes > self._kv_limit:
            self._end_idle(
                session,
                f"this forward needs {size_text(nbytes)} of KV; {size_text(others)} are held by "
                f"{len(self._sessions) - 1} other sessions, none idle for {self._limits.idle_s:g} s, and the limit is "
                f"{size_text(self._kv_limit)}: use a shorter text or smaller batch, or raise --max-kv-bytes",
            )

    def _end_idle(self, keep: Session | None, otherwise: str) -> None:
        """End the session that has been idle for longest, other than ``keep``, if that was for long enough.

        Raises:
            SessionLimit: none was idle for long enough; with the text ``otherwise``.
        """
        before = time.monotonic() - self._limits.idle_s
        idle = [
            (session.last_used, key)
            for key, session in self._sessions.items()
            if session is not keep and session.last_used <= before
        ]
        if not idle:
            raise SessionLimit(otherwise)
        since, key = min(idle)
        logger.info("session %d of client %d was idle for %.0f s: ended", key[1], key[0], time.monotonic() - since)
        del self._sessions[key]
