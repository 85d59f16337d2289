"""Forwards of the splits where the workers keep the KV, and how it is rebuilt after a worker has lost it.

Shape suffixes: B batch, T tokens, S all cached tokens, N tokens whose logits are asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from shmtransport import TransportError

from ..boundary.choices import MOST_PIPELINED
from ..boundary.operations import LAYER, LAYERS, STACK, Operation
from ..errors import UnsupportedBySplit
from ..model.program import execute
from .history import ForwardInput
from .offload import Offload
from .pipeline import Finish, execute_in_turn, split_prompt
from .remote_cache import RemoteCache, SessionIds
from .workers import Workers

_END_TIMEOUT_S = 5.0

OnLayers = Callable[[list[torch.Tensor]], None]
"""Called with copies of every layer's hidden states of one chunk."""


class Chunk(NamedTuple):
    """The tokens of a forward that cross together.

    Attributes:
        hidden_BTD: their embeddings.
        starts: what each worker must know first.
        keep: the number of last tokens whose result is wanted, or the indices of tokens whose logits are.
        session: the session's id, or those of several that share the row.
    """

    hidden_BTD: torch.Tensor
    starts: Sequence[dict[str, Any]]
    keep: int | list[int]
    session: int | list[int]


class SessionCall(NamedTuple):
    """One call of a forward: the worker's index, the operation, its argument, the result's shape, and keywords."""

    worker: int
    operation: Operation
    argument: torch.Tensor
    shape: tuple[int, ...]
    keywords: dict[str, Any]


SessionProgram = Generator[SessionCall, torch.Tensor, torch.Tensor]
"""Yields the calls of a chunk, is sent the result of each, and returns the chunk's."""


class ChunkExecutor(ABC):
    """How a forward is split into chunks, and a chunk into calls.

    A worker takes the calls of up to ``most_at_once`` chunks of a session in turn.
    """

    most_at_once: int

    def __init__(self, workers: Workers, offload: Offload) -> None:
        self._workers = workers
        self._offload = offload

    @abstractmethod
    def chunks(self, tokens: int, batch: int, wanted: int, most: int) -> Iterator[tuple[int, int]]:
        """Split a forward into chunks: the first token of each, and the one after its last.

        Args:
            tokens: tokens per row.
            batch: rows.
            wanted: the number of last tokens whose results are wanted.
            most: the most tokens of a chunk, where the arenas don't limit them further.
        """

    @abstractmethod
    def most_rows(self) -> tuple[int, int]:
        """The most tokens that one call may carry, and the most results, as the arenas have room."""

    @abstractmethod
    def program(self, chunk: Chunk, workers: int) -> SessionProgram:
        """The calls of a chunk; the session's KV then holds all of its tokens.

        Args:
            chunk: the tokens.
            workers: how many workers the chunk goes through, from the first.

        Returns:
            The results that are wanted, if the chunk goes through all workers.
        """

    def _hidden_shape(self, operation: Operation, hidden_BTD: torch.Tensor) -> tuple[int, ...]:
        return operation.result.shape(operation.bind((hidden_BTD,), self._workers.geometry))


class LayerExecutor(ChunkExecutor):
    """One call per layer; the results are hidden states. ``on_layers`` gets a chunk's, if its results are wanted."""

    most_at_once = 1  # a session is in the middle of one forward

    def __init__(self, workers: Workers, offload: Offload, on_layers: OnLayers | None = None) -> None:
        super().__init__(workers, offload)
        self._on_layers = on_layers

    def chunks(self, tokens: int, batch: int, wanted: int, most: int) -> Iterator[tuple[int, int]]:
        return _ranges(0, tokens, min(self.most_rows()[0] // batch, most))

    def most_rows(self) -> tuple[int, int]:
        rows = self._offload.rows_per_call(self._workers.geometry.hidden)
        return rows, rows

    def program(self, chunk: Chunk, workers: int) -> SessionProgram:
        hidden_BTD = chunk.hidden_BTD
        shape = self._hidden_shape(LAYER, hidden_BTD)
        seen = []
        for number, worker in enumerate(self._workers[:workers]):
            start = {"start": chunk.starts[number]}
            for index in worker.layers:
                keywords = {"layer": index, "session": chunk.session, **start}
                hidden_BTD = yield SessionCall(number, LAYER, hidden_BTD, shape, keywords)
                start = {}
                if self._on_layers is not None:
                    seen.append(hidden_BTD.clone())
        if self._on_layers is not None and chunk.keep:
            self._on_layers(seen)
        return hidden_BTD[:, hidden_BTD.shape[1] - chunk.keep :] if isinstance(chunk.keep, int) else hidden_BTD


class StackExecutor(ChunkExecutor):
    """One call per worker for all of its layers; the results are logits."""

    most_at_once = MOST_PIPELINED

    def chunks(self, tokens: int, batch: int, wanted: int, most: int) -> Iterator[tuple[int, int]]:
        rows, results = self.most_rows()
        limit = min(rows // batch, most)
        if batch * wanted <= results:
            yield from _ranges(0, tokens, limit)
        else:  # the logits are what is large: fewer tokens per call, but only of those whose logits are wanted
            yield from _ranges(0, tokens - wanted, limit)
            yield from _ranges(tokens - wanted, tokens, min(results // batch, limit))

    def most_rows(self) -> tuple[int, int]:
        geometry = self._workers.geometry
        return self._offload.rows_per_call(geometry.hidden), self._offload.rows_per_call(geometry.vocab)

    def program(self, chunk: Chunk, workers: int) -> SessionProgram:
        hidden_BTD = chunk.hidden_BTD
        last = len(self._workers) - 1
        shape = self._hidden_shape(LAYERS, hidden_BTD)
        for number in range(min(workers, last)):
            keywords = {"session": chunk.session, "start": chunk.starts[number]}
            hidden_BTD = yield SessionCall(number, LAYERS, hidden_BTD, shape, keywords)
        if workers <= last:
            return hidden_BTD
        kept = chunk.keep if isinstance(chunk.keep, int) else len(chunk.keep)
        sizes = STACK.bind((hidden_BTD,), self._workers.geometry, N=kept)
        keywords = {"session": chunk.session, "start": chunk.starts[last], "keep": chunk.keep}
        return (yield SessionCall(last, STACK, hidden_BTD, STACK.result.shape(sizes), keywords))


def _ranges(first: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``limit`` (at least one) from ``first`` to ``end``."""
    step = max(limit, 1)
    return ((start, min(start + step, end)) for start in range(first, end, step))


class SessionForwards:
    """Runs forwards over sessions whose KV the workers keep.

    A forward that fails leaves its cache to be rebuilt by the next one, from the tokens that went into it.

    Args:
        workers: who keeps the KV.
        offload: knows how much one call may carry.
        embed: returns the embeddings [B, T, D] of token ids [B, T]; embeddings as they are.
        pipeline: the most chunks of a prompt in flight at once at a worker, where several share the layers.
    """

    def __init__(
        self, workers: Workers, offload: Offload, embed: Callable[[torch.Tensor], torch.Tensor], pipeline: int
    ) -> None:
        self.workers = workers
        self.offload = offload
        self._embed = embed
        self._pipeline = pipeline
        self._ids = SessionIds(len(workers))

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
        executor = LayerExecutor(self.workers, self.offload, on_layers)
        return self._execute(executor, tokens, cache, tokens.source.shape[1])

    def stack(self, tokens: ForwardInput, cache: RemoteCache, wanted: int) -> torch.Tensor:
        """All layers, final norm and output matrix in one call per worker: logits [B, N, V] in the wire's dtype.

        Args:
            tokens: the input.
            cache: the session to continue.
            wanted: N, the number of last tokens whose logits are wanted.

        Raises:
            UnsupportedBySplit: the cache belongs to another model.
        """
        return self._execute(StackExecutor(self.workers, self.offload), tokens, cache, wanted)

    def end_sessions(self) -> None:
        """Free the KV of sessions whose cache was dropped. A worker that can't be asked drops them in the end."""
        ended = self._ids.ended
        with contextlib.suppress(IndexError):
            while ended:
                session_id = ended.popleft()
                for worker in self.workers:
                    with contextlib.suppress(TransportError):
                        worker.client.submit("end_session", session_id).result(timeout_s=_END_TIMEOUT_S)

    def _execute(self, executor: ChunkExecutor, tokens: ForwardInput, cache: RemoteCache, wanted: int) -> torch.Tensor:
        """A forward in as many chunks as the arenas need: the results of its last ``wanted`` tokens."""
        if not cache.is_of(self._ids):
            raise UnsupportedBySplit("past_key_values belongs to another model's connection; its KV is not there")
        self.end_sessions()
        batch, length = tokens.source.shape[:2]
        past = cache.get_seq_length()
        chunks = list(executor.chunks(length, batch, wanted, self._most_tokens(length)))
        # Causal: later tokens don't change earlier ones. So chunks may follow each other, or overlap.
        overlap = self._pipeline > 1 and len(self.workers) > 1
        results = []
        for group in [chunks] if overlap else [[chunk] for chunk in chunks]:
            first, last = group[0][0], group[-1][1]
            within = [(start - first, end - first) for start, end in group]
            keep = max(last - max(first, length - wanted), 0)
            result = self._execute_chunks(executor, tokens.chunk(first, last, past), cache, within, keep)
            # All but the last are copied out of the arena: the next chunk's results need the room.
            results.append(result if last == length else result.clone())
            del result
        return results[0] if len(results) == 1 else torch.cat(results, dim=1)

    def _most_tokens(self, tokens: int) -> int:
        """The most tokens of a chunk, so that there are enough chunks to keep all workers busy."""
        count = len(split_prompt(tokens, self._pipeline * len(self.workers) if self._pipeline > 1 else 1))
        return -(-tokens // count)

    def _execute_chunks(
        self,
        executor: ChunkExecutor,
        tokens: ForwardInput,
        cache: RemoteCache,
        chunks: Sequence[tuple[int, int]],
        keep: int,
    ) -> torch.Tensor:
        """The chunks of these tokens, as one step: all of it is repeated if a worker dies.

        Returns:
            The results of the last ``keep`` tokens.
        """
        length, past = tokens.source.shape[1], cache.get_seq_length()

        def program(first: int, last: int, epochs: Sequence[int]) -> SessionProgram:
            some = tokens.chunk(first, last, past)
            starts = [cache.start(some, past + first, worker) for worker in range(len(epochs))]
            kept = max(last - max(first, length - keep), 0)
            chunk = Chunk(self.sendable(some.source), starts, kept, cache.session_id)
            calls = executor.program(chunk, len(epochs))
            del chunk
            result = yield from noted(calls, [cache], epochs, is_last=last == length)
            return result if last == length else result.clone()

        def attempt() -> torch.Tensor:
            epochs = self.workers.epochs
            self.rebuild(executor, cache, epochs)
            programs = [program(first, last, epochs) for first, last in chunks]
            if len(programs) == 1:
                return execute(programs[0], self.call)
            at_once = min(self._pipeline, executor.most_at_once)
            results = execute_in_turn(programs, self._begin, lambda call: call.worker, at_once)
            return torch.cat(results, dim=1)

        result = self.workers.persist(attempt)
        cache.append(tokens)
        return result

    def rebuild(self, executor: ChunkExecutor, cache: RemoteCache, epochs: Sequence[int]) -> None:
        """Send everything that the cache stands for through the workers again, up to the last that lacks it."""
        workers = cache.to_rebuild(epochs)
        if workers == 0:
            return
        hidden_BSD = torch.cat([self._embed(source) for source in cache.history.sources()], dim=1)
        for before, run in cache.history.runs(hidden_BSD):
            for first, last in executor.chunks(run.source.shape[1], run.source.shape[0], 0, run.source.shape[1]):
                tokens = run.chunk(first, last, before)
                start = {**tokens.start(), "past": before + first, "select": None, "reserve": cache.reserved}
                chunk = Chunk(self.sendable(tokens.source), [start] * workers, 0, cache.session_id)
                is_last = before + last == cache.get_seq_length()
                program = executor.program(chunk, workers)
                execute(noted(program, [cache], epochs, is_last=is_last), self.call)

    def call(self, call: SessionCall) -> torch.Tensor:
        """Make one call and wait for its result."""
        worker = self.workers[call.worker]
        return worker.call(call.operation, (call.argument,), call.shape, **call.keywords)

    def _begin(self, call: SessionCall) -> Finish:
        worker = self.workers[call.worker]
        return worker.submit(call.operation, (call.argument,), call.shape, **call.keywords).result

    def sendable(self, source: torch.Tensor) -> torch.Tensor:
        """The embeddings of a source, in the first worker's request arena."""
        embedded = self._embed(source)
        return self.workers[0].loan(embedded.shape).copy_(embedded)


def noted(
    program: SessionProgram, caches: Sequence[RemoteCache], epochs: Sequence[int], *, is_last: bool
) -> SessionProgram:
    """The same program; caches learn which workers have what they stand for once the last chunk went through them.

    Args:
        program: of one chunk of several.
        caches: those of the chunk's sessions.
        epochs: those of the connections when the first chunk began.
        is_last: no chunk follows.
    """
    call = next(program)
    while True:
        for cache in caches:
            cache.unknown(call.worker)
        result = yield call
        try:
            following = program.send(result)
        except StopIteration as end:
            if is_last:
                _note(caches, call.worker, epochs)
            final: torch.Tensor = end.value
            return final
        del result
        if is_last and following.worker != call.worker:
            _note(caches, call.worker, epochs)
        call = following


def _note(caches: Sequence[RemoteCache], worker: int, epochs: Sequence[int]) -> None:
    for cache in caches:
        cache.known(worker, epochs[worker])
