"""KV caches that the worker keeps for its clients: one session a client and generation, within limits.

A session that is idle for long is ended when its room is wanted; its client builds it again if it comes back.

Shape suffixes: B batch, T tokens, D hidden.
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

from ..attention import SdpaAttention
from ..cache import GrowingCache
from ..decoder import AttentionContext
from ..errors import SessionLimit, SessionLost
from ..masks import causal_mask
from ..rotary import Rotary
from .kernels import Weights

logger = logging.getLogger("llama_split")

_MAX_MASK_BYTES = 1 << 30  # a byte for each pair of a new token and one that it may attend to


@dataclass(frozen=True)
class SessionLimits:
    """What clients may have: sessions of all of them and of one, and bytes of KV of all of them.

    ``max_kv_bytes`` is half of the memory of the worker's device by default. A session that was not used for
    ``idle_s`` seconds may be ended in favour of another.
    """

    max_sessions: int = 256
    max_sessions_per_client: int = 64
    max_kv_bytes: int | None = None
    idle_s: float = 600.0

    def kv_bytes(self, device: torch.device) -> int:
        """The bound on KV bytes in force."""
        if self.max_kv_bytes is not None:
            return self.max_kv_bytes
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory // 2
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Session:
    """One generation's KV cache, and what the layers of the forward in progress share."""

    def __init__(self, weights: Weights, rotary: Rotary, make_room: Callable[[Session, int], None]) -> None:
        self._weights = weights
        self._rotary = rotary
        self._make_room = make_room
        self.cache = GrowingCache(weights.geometry.layers)
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
        """Start a forward after ``past`` cached tokens; later ones are forgotten.

        ``positions`` [B or 1, T] int64; ``padding`` [B, past + T] bool, false where a token is padding; ``select`` [B]
        int64 are the rows of the present batch to go on with; ``reserve`` is how many tokens a row is expected to have
        in the end. ``lengths`` [T] int64 choose the rotary frequencies where these depend on the length of the text;
        ``sequences`` [B, past + T] int64 say which of the texts packed into its row each token is of. All tensors are
        read once, into private memory.

        Raises:
            ValueError: they don't fit the cache or each other.
            SessionLost: there are no ``past`` tokens here.
            SessionLimit: there is no room for so much KV.
        """
        batch, tokens = hidden_BTD.shape[:2]
        held = min(layer.get_seq_length() for layer in self.cache.layers)  # a forward may have ended half-way
        if not (type(past) is type(reserve) is int and past >= 0):
            raise ValueError(f"{past} past and {reserve} reserved tokens are asked for; both are counts")
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
        """The context for layer ``index``, which must be the next one of the forward in progress.

        Raises:
            SessionLost: no forward is in progress.
            ValueError: it is another layer's turn.
        """
        if self._context is None:
            raise SessionLost(f"layer {index} is asked for, and no forward is in progress in this session")
        if index != self._next_layer:
            raise ValueError(f"layer {index} is asked for; the forward in progress is at layer {self._next_layer}")
        self._next_layer += 1
        self.last_used = time.monotonic()
        return self._context

    def _reserve(self, batch: int, length: int, reserve: int) -> None:
        """Make room for the cache as it will be; for the expected length if that fits, else for what is due now."""
        geometry = self._weights.geometry
        token_bytes = 2 * geometry.layers * geometry.kv_width * self._weights.dtype.itemsize
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
        """The rows to go on with, in private memory; none where the batch stays as it is, or begins anew.

        Raises:
            ValueError: they are not of this batch, or the batch differs and none are named.
        """
        held = self.cache.batch
        if self.cache.get_seq_length() == 0:
            if held != batch:
                self.cache.reset()  # nothing of another size stays allocated
            held = 0
        if select is None:
            if held not in (0, batch):
                raise ValueError(f"the session holds a batch of {held}; the forward is of {batch}")
            return None
        rows = select.clone()
        if rows.dtype != torch.int64 or rows.shape != (batch,) or not all(0 <= row < held for row in rows.tolist()):
            raise ValueError(f"rows to go on with must be {batch} numbers below {held}")
        return rows


def _private(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Any:
    """A copy that its owner can't change any more; None if there is none.

    Raises:
        ValueError: it is of another shape or dtype.
    """
    if tensor is None:
        return None
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} are {list(tensor.shape)} of {tensor.dtype}, not {list(shape)} of {dtype}")
    return tensor.to(device, copy=True)


class Sessions:
    """All sessions, by connection and the client's own number."""

    def __init__(self, weights: Weights, limits: SessionLimits | None = None) -> None:
        self._weights = weights
        self._limits = SessionLimits() if limits is None else limits
        self._kv_limit = self._limits.kv_bytes(weights.device)
        self._rotary = Rotary(weights.config, weights.device)
        self._sessions: dict[tuple[int, int], Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that are granted to sessions."""
        return sum(session.kv_bytes for session in self._sessions.values())

    def open(self, connection: int, number: int) -> Session:
        """The session of this number, made if it is new.

        Raises:
            SessionLimit: there are too many.
        """
        key = (connection, number)
        session = self._sessions.get(key)
        if session is None:
            limits = self._limits
            if sum(owner == connection for owner, _ in self._sessions) >= limits.max_sessions_per_client:
                raise SessionLimit(
                    f"this client has {limits.max_sessions_per_client} KV sessions, the most that one may have: drop "
                    "caches that are not needed"
                )
            while len(self._sessions) >= limits.max_sessions:
                self._end_idle(
                    None,
                    f"the worker has {len(self._sessions)} KV sessions, the most that it takes, and none was idle for "
                    f"{limits.idle_s:g} s: try again later, or raise --max-sessions",
                )
            session = self._sessions[key] = Session(self._weights, self._rotary, self._make_room)
        return session

    def end(self, connection: int, number: int) -> None:
        """Free one session; one that never began is no error."""
        self._sessions.pop((connection, number), None)

    def end_connection(self, connection: int) -> None:
        """Free all sessions of a client that has gone."""
        for key in [key for key in self._sessions if key[0] == connection]:
            del self._sessions[key]

    def _make_room(self, session: Session, nbytes: int) -> None:
        """Let a session have so many bytes of KV, ending idle ones for it.

        Raises:
            SessionLimit: they can't be had.
        """
        if nbytes > self._kv_limit:  # no session is ended in vain
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
        """End the session that was idle for longest, if it was for long enough.

        Raises:
            SessionLimit: none was; with the text ``otherwise``.
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
