"""Forwards of continuous batching where the workers keep the KV: layer and stack.

transformers' scheduler keeps the tables of its paged cache on this side, as for any model. Each of its requests is a
session at the workers, and one call carries the tokens of all requests of a step, in one row. When the scheduler frees
a request's place in the cache, its session ends.

Shape suffixes: B batch (here 1), T tokens of all requests, N tokens whose logits are asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..model.program import execute
from .history import ForwardInput
from .paged import BatchedRequest, PagedCache
from .remote_cache import RemoteCache
from .session_forwards import Chunk, ChunkExecutor, LayerExecutor, SessionForwards, StackExecutor, noted


class _Part(NamedTuple):
    """Some tokens of one request: which ones of the row, and the session that they continue."""

    first: int
    last: int
    cache: RemoteCache


class BatchedSessions:
    """Runs forwards over the sessions of all requests of a scheduler.

    Args:
        forwards: runs forwards over single sessions, and replays those that a worker has lost.
    """

    def __init__(self, forwards: SessionForwards) -> None:
        self._forwards = forwards
        self._caches: dict[str, RemoteCache] = {}

    def layers(self, tokens: ForwardInput, batch: PagedCache) -> torch.Tensor:
        """All decoder layers, one call each: hidden states [1, T, D] in the wire's dtype."""
        executor = LayerExecutor(self._forwards.workers, self._forwards.offload)
        return self._execute(executor, tokens, batch, None)

    def stack(self, tokens: ForwardInput, batch: PagedCache, rows: Sequence[int]) -> torch.Tensor:
        """All layers, final norm and output matrix: logits [1, N, V] of these rows, in the wire's dtype."""
        executor = StackExecutor(self._forwards.workers, self._forwards.offload)
        return self._execute(executor, tokens, batch, rows)

    def _execute(
        self, executor: ChunkExecutor, tokens: ForwardInput, batch: PagedCache, rows: Sequence[int] | None
    ) -> torch.Tensor:
        """The results of these rows, in their order; None: of all."""
        batch.watch(self._freed)
        requests = batch.requests({name: cache.get_seq_length() for name, cache in self._caches.items()})
        self._forwards.end_sessions()
        results, order = [], []
        for parts in self._groups(requests, executor, rows):
            first, last = parts[0].first, parts[-1].last
            places = [place for place, row in enumerate(rows or ()) if first <= row < last]
            keep = last - first if rows is None else [rows[place] - first for place in places]
            results.append(self._execute_parts(executor, tokens, parts, keep))
            order += places
        if len(results) == 1:
            return results[0]
        joined = torch.cat(results, dim=1)
        return joined if rows is None else joined[:, torch.tensor(order).argsort()]

    def _freed(self, request_id: str) -> None:
        cache = self._caches.pop(request_id, None)
        if cache is not None:
            cache.end()  # the error of a worker that was lost may refer to it, until a garbage collection
            self._forwards.end_sessions()

    def _groups(
        self, requests: Sequence[BatchedRequest], executor: ChunkExecutor, rows: Sequence[int] | None
    ) -> Iterator[list[_Part]]:
        """Divide a step into calls that the arenas have room for; a long prompt's tokens may go into several."""
        most_tokens, most_kept = executor.most_rows()
        kept = set(rows or ())
        group: list[_Part] = []
        taken = results = 0
        row = 0
        for request in requests:
            cache = self._cache_of(request)
            end = row + request.tokens
            while row < end:
                last = min(end, row + most_tokens - taken)
                wanted = len(kept.intersection(range(row, last)))
                if group and results + wanted > most_kept:
                    yield group
                    group, taken, results = [], 0, 0
                    continue
                group.append(_Part(row, last, cache))
                taken, results, row = taken + last - row, results + wanted, last
                if taken == most_tokens:
                    yield group
                    group, taken, results = [], 0, 0
        if group:
            yield group

    def _cache_of(self, request: BatchedRequest) -> RemoteCache:
        """The session of a request; one that the scheduler begins again starts over."""
        cache = self._caches.get(request.request_id)
        if cache is None:
            cache = self._caches[request.request_id] = self._forwards.new_cache()
        if request.past < cache.get_seq_length():
            cache.crop(request.past - cache.get_seq_length())
        return cache

    def _execute_parts(
        self, executor: ChunkExecutor, tokens: ForwardInput, parts: Sequence[_Part], keep: int | list[int]
    ) -> torch.Tensor:
        """One call's tokens: repeated as a whole if a worker dies."""
        forwards = self._forwards
        caches = [part.cache for part in parts]
        first, last = parts[0].first, parts[-1].last

        def attempt() -> torch.Tensor:
            epochs = forwards.workers.epochs
            for cache in caches:
                forwards.rebuild(executor, cache, epochs)
            hidden_BTD = forwards.sendable(tokens.source[:, first:last])
            start: dict[str, Any] = {
                "positions": tokens.positions[:, first:last],
                "tokens": [part.last - part.first for part in parts],
                "past": [cache.get_seq_length() for cache in caches],
                "lengths": None if tokens.lengths is None else tokens.lengths[first:last],
            }
            sessions = [cache.session_id for cache in caches]
            chunk = Chunk(hidden_BTD, [start] * len(epochs), keep, sessions)
            program = executor.program(chunk, len(epochs))
            return execute(noted(program, caches, epochs, is_last=True), forwards.call)

        result = forwards.workers.persist(attempt)
        for part in parts:
            part.cache.append(tokens.chunk(part.first, part.last, 0))
        return result
