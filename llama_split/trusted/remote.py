"""The trusted side of the boundary: sends steps to the worker."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from shmtransport import Client, PeerDied, Statistics

from ..checkpoint import Checkpoint
from ..config import DTYPE_NAMES
from ..decoder import Step
from ..errors import UnsupportedBySplit, WorkerMismatch
from ..operations import LAYER, LM_HEAD, Operation
from .cache import RemoteCache

_ARENA_SHARE = 4  # one call's tensor takes at most this part of an arena; longer ones cross in several calls


class Remote:
    """A connection to a worker that serves the same model.

    Raises:
        WorkerMismatch: it serves another one, or computes in another dtype.
        shmtransport.TransportError: no worker, or none that fits this transport.
    """

    def __init__(self, client: Client, checkpoint: Checkpoint, dtype: torch.dtype, arena_bytes: int) -> None:
        self.client = client
        self._geometry = checkpoint.geometry
        self._arena_bytes = arena_bytes
        self._dtype = dtype
        self._ended_sessions: deque[int] = deque()
        self._next_session = 0
        self._lock = threading.Lock()
        self._check(client.call("describe"), checkpoint)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor that will be sent; ordinary memory where it is too large to be sent in one piece."""
        rows, width = shape[0] * shape[1], shape[2]
        if rows > self._rows_per_call(width):
            return torch.empty(tuple(shape), dtype=dtype)
        return self.client.empty(shape, dtype)

    def perform(self, step: Step) -> torch.Tensor:
        """Make one step on the worker: one call, or several where the tensors don't fit the arenas together."""
        rows_BD = step.argument
        geometry = self._geometry
        limit = self._rows_per_call(max(step.operation.input_width(geometry), step.operation.output_width(geometry)))
        if rows_BD.shape[0] * rows_BD.shape[1] <= limit:
            return self._call(step.operation, step.layer, rows_BD)
        flat = rows_BD.reshape(1, -1, rows_BD.shape[-1])
        parts = [self._call(step.operation, step.layer, part).clone() for part in torch.split(flat, limit, dim=1)]
        return torch.cat(parts, dim=1).view(*rows_BD.shape[:-1], -1)

    def lm_head(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of these positions."""
        return self.perform(Step(LM_HEAD, 0, hidden_BTD))

    def layers(
        self, hidden_BTD: torch.Tensor, cache: RemoteCache, positions: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """All decoder layers on the worker, one call each, over the session's KV.

        Raises:
            UnsupportedBySplit: the cache is another connection's.
        """
        if not cache.is_of(self._ended_sessions):
            raise UnsupportedBySplit("past_key_values belongs to another model's connection; its KV is not there")
        self.end_sessions()
        start: dict[str, Any] | None = cache.start(positions, padding)
        batch, tokens = hidden_BTD.shape[:2]
        for index in range(self._geometry.layers):
            hidden_BTD = self.client.call(LAYER.name, hidden_BTD, layer=index, session=cache.session, start=start)
            start = None
        cache.advance(batch, tokens)
        return hidden_BTD

    def new_cache(self) -> RemoteCache:
        """A new session's cache; the session ends with it."""
        with self._lock:
            self._next_session += 1
            return RemoteCache(self._next_session, self._ended_sessions)

    def end_sessions(self) -> None:
        """Free the KV of sessions whose cache has died here. A dead worker has freed it already."""
        while self._ended_sessions:
            session = self._ended_sessions.popleft()
            try:
                self.client.call("end_session", session)
            except PeerDied:
                return

    def statistics(self) -> Statistics:
        return self.client.statistics()

    def _call(self, operation: Operation, layer: int, argument: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.client.call(operation.name, argument, layer=layer)
        return result

    def _rows_per_call(self, width: int) -> int:
        return max(self._arena_bytes // (_ARENA_SHARE * width * self._dtype.itemsize), 1)

    def _check(self, found: dict[str, Any], checkpoint: Checkpoint) -> None:
        address = self.client.address
        if found["geometry"] != repr(checkpoint.geometry):
            raise WorkerMismatch(
                f"the worker at {address} serves another model, {found['geometry']}; "
                f"this side has {checkpoint.geometry}: start it with the same --model"
            )
        if found["fingerprint"] != checkpoint.fingerprint():
            raise WorkerMismatch(
                f"the worker at {address} has a model of this shape but other weights: start it with the same --model"
            )
        wanted = DTYPE_NAMES[self._dtype]
        if found["dtype"] != wanted:
            raise WorkerMismatch(
                f"the worker at {address} computes in {found['dtype']}, this side in {wanted}: use one dtype on both"
            )
