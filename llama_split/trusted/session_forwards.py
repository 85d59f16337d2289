"""Forwards of the splits where the worker keeps the KV, and how it is rebuilt after a worker has lost it.

Shape suffixes: B batch, T tokens, S all cached tokens, N tokens whose logits are asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from shmtransport import TransportError

from ..boundary.operations import LAYER, STACK
from ..errors import UnsupportedBySplit
from .history import ForwardInput
from .offload import Offload
from .remote_cache import RemoteCache, SessionIds
from .worker_client import WorkerClient

_END_TIMEOUT_S = 5.0

OnLayers = Callable[[list[torch.Tensor]], None]
"""Called with copies of every layer's hidden states of one chunk."""


class Chunk(NamedTuple):
    """The tokens of a forward that cross together.

    ``hidden_BTD`` are their embeddings, ``start`` is what the worker must know first, and ``keep`` is the number of
    last tokens whose result is wanted.
    """

    hidden_BTD: torch.Tensor
    start: dict[str, Any]
    keep: int


class ChunkExecutor(ABC):
    """How a forward is split into chunks, and a chunk into calls."""

    def __init__(self, worker: WorkerClient, offload: Offload) -> None:
        self._worker = worker
        self._offload = offload

    @abstractmethod
    def chunks(self, tokens: int, batch: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Split a forward into chunks: the first token of each, and the one after its last.

        Args:
            tokens: tokens per row.
            batch: rows.
            wanted: the number of last tokens whose results are wanted.
        """

    @abstractmethod
    def execute(self, chunk: Chunk, session_id: int) -> torch.Tensor:
        """The result for the chunk's last ``keep`` tokens; the session's KV then holds all of its tokens."""


class LayerExecutor(ChunkExecutor):
    """One call per layer; the results are hidden states. ``on_layers`` gets a chunk's, if its results are wanted."""

    def __init__(self, worker: WorkerClient, offload: Offload, on_layers: OnLayers | None = None) -> None:
        super().__init__(worker, offload)
        self._on_layers = on_layers

    def chunks(self, tokens: int, batch: int, wanted: int) -> Iterator[tuple[int, int]]:
        return _ranges(0, tokens, self._offload.rows_per_call(self._worker.geometry.hidden) // batch)

    def execute(self, chunk: Chunk, session_id: int) -> torch.Tensor:
        hidden_BTD, start = chunk.hidden_BTD, {"start": chunk.start}
        shape = LAYER.result.shape(LAYER.bind((hidden_BTD,), self._worker.geometry))
        seen = []
        for index in range(self._worker.geometry.layers):
            hidden_BTD = self._worker.call(LAYER, (hidden_BTD,), shape, layer=index, session=session_id, **start)
            start = {}
            if self._on_layers is not None:
                seen.append(hidden_BTD.clone())
        if self._on_layers is not None and chunk.keep:
            self._on_layers(seen)
        return hidden_BTD[:, hidden_BTD.shape[1] - chunk.keep :]


class StackExecutor(ChunkExecutor):
    """One call for all layers; the results are logits."""

    def chunks(self, tokens: int, batch: int, wanted: int) -> Iterator[tuple[int, int]]:
        geometry = self._worker.geometry
        rows = self._offload.rows_per_call(geometry.hidden)
        if batch * wanted <= self._offload.rows_per_call(geometry.vocab):
            yield from _ranges(0, tokens, rows // batch)
        else:  # the logits are what is large: fewer tokens per call, but only of those whose logits are wanted
            yield from _ranges(0, tokens - wanted, rows // batch)
            widest = max(geometry.hidden, geometry.vocab)
            yield from _ranges(tokens - wanted, tokens, self._offload.rows_per_call(widest) // batch)

    def execute(self, chunk: Chunk, session_id: int) -> torch.Tensor:
        shape = STACK.result.shape(STACK.bind((chunk.hidden_BTD,), self._worker.geometry, N=chunk.keep))
        return self._worker.call(
            STACK, (chunk.hidden_BTD,), shape, session=session_id, start=chunk.start, keep=chunk.keep
        )


def _ranges(first: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``limit`` (at least one) from ``first`` to ``end``."""
    step = max(limit, 1)
    return ((start, min(start + step, end)) for start in range(first, end, step))


class SessionForwards:
    """Runs forwards over sessions whose KV the worker keeps.

    A forward that fails leaves its cache to be rebuilt by the next one, from the tokens that went into it.

    Args:
        worker: who keeps the KV.
        offload: knows how much one call may carry.
        embed: returns the embeddings [B, T, D] of token ids [B, T]; embeddings as they are.
    """

    def __init__(self, worker: WorkerClient, offload: Offload, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._worker = worker
        self._offload = offload
        self._embed = embed
        self._ids = SessionIds()

    def new_cache(self, reserved: int = 0) -> RemoteCache:
        """The cache of a new session, which ends when the cache is dropped."""
        return RemoteCache(self._ids, reserved)

    def layers(self, tokens: ForwardInput, cache: RemoteCache, on_layers: OnLayers | None = None) -> torch.Tensor:
        """All decoder layers, one call each: hidden states [B, T, D] in the wire's dtype.

        Args:
            tokens: the input.
            cache: the session to continue.
            on_layers: called for each chunk with copies of every layer's hidden states.

        Raises:
            UnsupportedBySplit: the cache belongs to another model.
        """
        executor = LayerExecutor(self._worker, self._offload, on_layers)
        return self._execute(executor, tokens, cache, tokens.source.shape[1])

    def stack(self, tokens: ForwardInput, cache: RemoteCache, wanted: int) -> torch.Tensor:
        """All layers, final norm and output matrix in one call: logits [B, N, V] in the wire's dtype.

        Args:
            tokens: the input.
            cache: the session to continue.
            wanted: N, the number of last tokens whose logits are wanted.

        Raises:
            UnsupportedBySplit: the cache belongs to another model.
        """
        return self._execute(StackExecutor(self._worker, self._offload), tokens, cache, wanted)

    def end_sessions(self) -> None:
        """Free the KV of sessions whose cache was dropped. If the worker can't be asked, it drops them in the end."""
        ended = self._ids.ended
        with contextlib.suppress(TransportError, IndexError):
            while ended:
                pending = self._worker.client.submit("end_session", ended.popleft())
                pending.result(timeout_s=_END_TIMEOUT_S)

    def _execute(self, executor: ChunkExecutor, tokens: ForwardInput, cache: RemoteCache, wanted: int) -> torch.Tensor:
        """A forward in as many chunks as the arenas need: the results of its last ``wanted`` tokens."""
        if not cache.is_of(self._ids):
            raise UnsupportedBySplit("past_key_values belongs to another model's connection; its KV is not there")
        self.end_sessions()
        batch, length = tokens.source.shape[:2]
        past = cache.get_seq_length()
        results = []
        for first, last in executor.chunks(length, batch, wanted):  # causal: later tokens don't change earlier ones
            keep = max(last - max(first, length - wanted), 0)
            result = self._execute_chunk(executor, tokens.chunk(first, last, past), cache, keep)
            # All but the last are copied out of the arena: the next chunk's results need the room.
            results.append(result if last == length else result.clone())
            del result
        return results[0] if len(results) == 1 else torch.cat(results, dim=1)

    def _execute_chunk(
        self, executor: ChunkExecutor, tokens: ForwardInput, cache: RemoteCache, keep: int
    ) -> torch.Tensor:
        def attempt() -> torch.Tensor:
            epoch = self._worker.epoch
            if cache.must_be_rebuilt(epoch):
                self._rebuild(executor, cache, epoch)
            chunk = Chunk(self._sendable(tokens.source), cache.start(tokens), keep)
            with cache.forward(tokens, epoch):
                return executor.execute(chunk, cache.session_id)

        return self._worker.persist(attempt)

    def _rebuild(self, executor: ChunkExecutor, cache: RemoteCache, epoch: int) -> None:
        """Send everything that the cache stands for through the worker again."""
        hidden_BSD = torch.cat([self._embed(source) for source in cache.history.sources()], dim=1)
        for before, run in cache.history.runs(hidden_BSD):
            for first, last in executor.chunks(run.source.shape[1], run.source.shape[0], 0):
                tokens = run.chunk(first, last, before)
                start = {**tokens.start(), "past": before + first, "select": None, "reserve": cache.reserved}
                executor.execute(Chunk(self._sendable(tokens.source), start, 0), cache.session_id)
        cache.rebuilt(epoch)

    def _sendable(self, source: torch.Tensor) -> torch.Tensor:
        """The embeddings of a source, in the request arena."""
        embedded = self._embed(source)
        return self._worker.loan(embedded.shape).copy_(embedded)
