"""Forwards of the splits where the worker keeps the KV, and how that is built again when a worker has lost it.

Shape suffixes: B batch, T tokens, S all tokens cached, N tokens whose logits are asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from shmtransport import TransportError

from ..errors import UnsupportedBySplit
from ..operations import LAYER, STACK
from .cache import RemoteCache, SessionNumbers
from .history import Tokens
from .link import WorkerLink
from .remote import Remote

_END_TIMEOUT_S = 5.0

OnLayers = Callable[[list[torch.Tensor]], None]


class Part(NamedTuple):
    """So many of a forward's tokens as cross at once.

    ``hidden_BTD`` are their embeddings, ``start`` is what the worker must know first, ``keep`` of how many of the last
    ones the result is wanted.
    """

    hidden_BTD: torch.Tensor
    start: dict[str, Any]
    keep: int


class Calls(ABC):
    """How one part of a forward is put into calls."""

    @abstractmethod
    def cut(self, tokens: int, batch: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Where a forward of so many tokens is cut, first and last of each part; results are wanted of the last."""

    @abstractmethod
    def send(self, part: Part, session: int) -> torch.Tensor:
        """The result for the part's last ``keep`` tokens; the session's KV then holds all of them."""


class LayerCalls(Calls):
    """A call a layer. The result are hidden states; ``on_layers`` is given copies of each part's, a layer each."""

    def __init__(self, link: WorkerLink, remote: Remote, on_layers: OnLayers | None = None) -> None:
        self._link = link
        self._remote = remote
        self._on_layers = on_layers

    def cut(self, tokens: int, batch: int, wanted: int) -> Iterator[tuple[int, int]]:
        return _cut(0, tokens, self._remote.rows_per_call(self._link.geometry.hidden) // batch)

    def send(self, part: Part, session: int) -> torch.Tensor:
        hidden_BTD, start = part.hidden_BTD, {"start": part.start}
        seen = []
        for index in range(self._link.geometry.layers):
            hidden_BTD = self._link.call(LAYER, (hidden_BTD,), layer=index, session=session, **start)
            start = {}
            if self._on_layers is not None:
                seen.append(hidden_BTD.clone())
        if self._on_layers is not None and part.keep:
            self._on_layers(seen)
        return hidden_BTD[:, hidden_BTD.shape[1] - part.keep :]


class StackCalls(Calls):
    """One call for all. The result are logits."""

    def __init__(self, link: WorkerLink, remote: Remote) -> None:
        self._link = link
        self._remote = remote

    def cut(self, tokens: int, batch: int, wanted: int) -> Iterator[tuple[int, int]]:
        geometry = self._link.geometry
        rows = self._remote.rows_per_call(geometry.hidden)
        if batch * wanted <= self._remote.rows_per_call(geometry.vocab):
            yield from _cut(0, tokens, rows // batch)
        else:  # logits are what is large: few tokens at a time, but only of those whose logits are wanted
            yield from _cut(0, tokens - wanted, rows // batch)
            widest = max(geometry.hidden, geometry.vocab)
            yield from _cut(tokens - wanted, tokens, self._remote.rows_per_call(widest) // batch)

    def send(self, part: Part, session: int) -> torch.Tensor:
        known = {"N": part.keep}
        return self._link.call(
            STACK, (part.hidden_BTD,), known=known, session=session, start=part.start, keep=part.keep
        )


def _cut(first: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    step = max(limit, 1)
    return ((start, min(start + step, end)) for start in range(first, end, step))


class KeptForwards:
    """Runs forwards over sessions whose KV the worker keeps.

    ``embed`` gives the embeddings [B, T, D] of a source, which is token ids [B, T] or embeddings. A forward that fails
    leaves its cache to be built again by the next one, from what it was made of.
    """

    def __init__(self, link: WorkerLink, remote: Remote, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._link = link
        self._remote = remote
        self._embed = embed
        self._numbers = SessionNumbers()

    def new_cache(self, reserved: int = 0) -> RemoteCache:
        """A new session's cache; the session ends with it."""
        return RemoteCache(self._numbers, reserved)

    def layers(self, tokens: Tokens, cache: RemoteCache, on_layers: OnLayers | None = None) -> torch.Tensor:
        """All decoder layers, one call each: hidden states [B, T, D], of the wire's dtype.

        Raises:
            UnsupportedBySplit: the cache is another model's.
        """
        calls = LayerCalls(self._link, self._remote, on_layers)
        return self._run(calls, tokens, cache, tokens.source.shape[1])

    def stack(self, tokens: Tokens, cache: RemoteCache, wanted: int) -> torch.Tensor:
        """All layers, the final norm and the output matrix in one call: the last ``wanted`` tokens' logits [B, N, V].

        Raises:
            UnsupportedBySplit: the cache is another model's.
        """
        return self._run(StackCalls(self._link, self._remote), tokens, cache, wanted)

    def end_sessions(self) -> None:
        """Free the KV of sessions whose cache has died here; a worker that can't be asked does so in the end."""
        ended = self._numbers.ended
        with contextlib.suppress(TransportError, IndexError):
            while ended:
                pending = self._link.client.submit("end_session", ended.popleft())
                pending.result(timeout_s=_END_TIMEOUT_S)

    def _run(self, calls: Calls, tokens: Tokens, cache: RemoteCache, wanted: int) -> torch.Tensor:
        """A forward in as many parts as the arenas need: the results of its last ``wanted`` tokens."""
        if not cache.is_of(self._numbers):
            raise UnsupportedBySplit("past_key_values belongs to another model's connection; its KV is not there")
        self.end_sessions()
        batch, length = tokens.source.shape[:2]
        past = cache.get_seq_length()
        results = []
        try:
            for first, last in calls.cut(length, batch, wanted):  # causal: later tokens don't change earlier ones
                keep = max(last - max(first, length - wanted), 0)
                result = self._part(calls, tokens.cut(first, last, past), cache, keep)
                # All but the last are copied out of the arena: the next part's results need the room.
                results.append(result if last == length else result.clone())
                del result
        except BaseException:
            cache.rewind(past)  # as if the forward had never begun: whoever repeats it repeats its first parts too
            raise
        return results[0] if len(results) == 1 else torch.cat(results, dim=1)

    def _part(self, calls: Calls, tokens: Tokens, cache: RemoteCache, keep: int) -> torch.Tensor:
        def attempt() -> torch.Tensor:
            epoch = self._link.epoch
            try:
                if cache.must_be_built(epoch):
                    self._build(calls, cache)
                    cache.built(epoch)
                part = Part(self._sendable(tokens.source), cache.start(tokens), keep)
                result = calls.send(part, cache.session)
            except BaseException:
                cache.lose()
                raise
            cache.advance(tokens, epoch)
            return result

        return self._link.persist(attempt)

    def _build(self, calls: Calls, cache: RemoteCache) -> None:
        """Put all that the cache stands for through the worker again."""
        hidden_BSD = torch.cat([self._embed(source) for source in cache.history.sources()], dim=1)
        for before, run in cache.history.runs(hidden_BSD):
            for first, last in calls.cut(run.source.shape[1], run.source.shape[0], 0):
                tokens = run.cut(first, last, before)
                start = {**tokens.start(), "past": before + first, "select": None, "reserve": cache.reserved}
                calls.send(Part(self._sendable(tokens.source), start, 0), cache.session)

    def _sendable(self, source: torch.Tensor) -> torch.Tensor:
        """A source's embeddings, made where they are sent from."""
        embedded = self._embed(source)
        return self._remote.loan(embedded.shape).copy_(embedded)
