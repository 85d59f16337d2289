"""The trusted side's stand-in for a KV cache that the worker keeps, and what it takes to build that anew.

Shape suffixes: B batch, T tokens of one forward, S all tokens that are cached, D hidden.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedBySplit

_NOWHERE = -1


class History:
    """What went through the forwards that filled a cache.

    A source is token ids [B, T], or embeddings [B, T, D] where the caller passed these; of both there may be some.
    """

    def __init__(self) -> None:
        self._sources: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._masks: list[torch.Tensor] = []
        self._length = 0

    def append(self, source: torch.Tensor, positions: torch.Tensor, padding: torch.Tensor | None) -> None:
        """One more forward: its source, positions [1 or B, T], and the mask [B, S] of all tokens until now, if any."""
        batch, tokens = source.shape[:2]
        own = torch.ones(batch, tokens, dtype=torch.bool) if padding is None else padding[:, -tokens:].bool()
        self._sources.append(source.clone())
        self._positions.append(positions.expand(batch, tokens).clone())
        self._masks.append(own.clone())
        self._length += tokens

    def crop(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        for parts in (self._sources, self._positions, self._masks):
            excess = self._length - length
            while excess > 0:  # from the end: what is cropped is usually of the last forward
                last = parts.pop()
                if last.shape[1] > excess:
                    parts.append(last[:, : last.shape[1] - excess])
                excess -= last.shape[1]
        self._length = length

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch."""
        self._join()
        for parts in (self._sources, self._positions, self._masks):
            parts[:] = [part[rows] for part in parts]

    def copy(self) -> History:
        """One that goes on alone."""
        copied = History()
        self._join()
        copied._sources, copied._positions, copied._masks = self._sources[:], self._positions[:], self._masks[:]
        copied._length = self._length
        return copied

    def joined(self) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Sources in order, positions [B, S], mask [B, S]."""
        self._join()
        return self._sources, self._positions[0], self._masks[0]

    def _join(self) -> None:
        """Make one part of each run of parts, so that what edits them takes no longer for many forwards."""
        runs = itertools.groupby(self._sources, key=torch.Tensor.dim)
        self._sources = [torch.cat(list(parts), dim=1) for _, parts in runs]
        for parts in (self._positions, self._masks):
            parts[:] = [torch.cat(parts, dim=1)] if parts else []


class _RemoteLayer(CacheLayerMixin):  # type: ignore[misc]
    """Knows how long the worker's cache is, and what to do to it before the next forward."""

    is_croppable = True
    is_sliding = False

    def __init__(self, history: History) -> None:
        super().__init__()
        self.history = history
        self.length = 0
        self.batch = 0
        self.select: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise UnsupportedBySplit("this cache lives on the worker; keys and values can't be put into it from here")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        self.lazy_initialization(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        self.forget_after(max(self.length + tokens_to_remove, 0))

    def reset(self) -> None:
        self.forget_after(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._go_on_with(beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._go_on_with(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._go_on_with(torch.arange(self.batch)[indices.cpu()])

    def forget_after(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length < self.length:
            self.history.crop(length)
        self.length = length
        if length == 0:  # the next forward starts anew, with a batch of any size
            self.select = None

    def _go_on_with(self, rows: torch.Tensor) -> None:
        rows = rows.to(torch.int64)
        if self.length:
            self.history.select(rows)
            self.select = rows if self.select is None else self.select[rows]
            self.batch = rows.shape[0]


class SessionNumbers:
    """Numbers of one connection's sessions; those whose cache has died are collected in ``ended``."""

    def __init__(self) -> None:
        self.ended: deque[int] = deque()
        self._numbers = itertools.count(1)

    def new(self) -> int:
        """A number that was never given before."""
        return next(self._numbers)


class RemoteCache(Cache):  # type: ignore[misc]
    """A session's KV on the worker, as transformers wants to see it.

    When this object dies, its number is put among the ended ones; whoever talks to the worker next ends the session
    there. A copy is a session of its own, built when it is first used. ``reserved`` is how many tokens a row will
    probably have.
    """

    def __init__(self, numbers: SessionNumbers, reserved: int = 0, history: History | None = None) -> None:
        self._state = _RemoteLayer(History() if history is None else history)
        super().__init__(layers=[self._state])
        self.session = numbers.new()
        self.reserved = reserved
        self._numbers = numbers
        self._epoch = _NOWHERE
        weakref.finalize(self, numbers.ended.append, self.session).atexit = False

    @property
    def history(self) -> History:
        """What it takes to build the worker's KV anew."""
        return self._state.history

    def is_of(self, numbers: SessionNumbers) -> bool:
        """Whether the session is one of the model whose numbers these are."""
        return self._numbers is numbers

    def must_be_built(self, epoch: int) -> bool:
        """Whether what this cache stands for is not on the worker that was connected to as the ``epoch``-th."""
        return self._state.length > 0 and self._epoch != epoch

    def rewind(self, length: int) -> None:
        """Forget what a forward that failed has added to the first ``length`` tokens."""
        self._state.forget_after(length)
        self.lose()

    def lose(self) -> None:
        """What the worker has is not known any more: it must be built before the next forward."""
        self._epoch = _NOWHERE

    def built(self, epoch: int) -> None:
        """The worker has what this cache stands for."""
        self._epoch = epoch
        self._state.select = None

    def __copy__(self) -> RemoteCache:
        copied = RemoteCache(self._numbers, self.reserved, self.history.copy())
        copied._state.length, copied._state.batch = self._state.length, self._state.batch
        return copied

    def __deepcopy__(self, _memo: dict[int, Any]) -> RemoteCache:
        return self.__copy__()

    def start(self, positions: torch.Tensor, padding: torch.Tensor | None) -> dict[str, Any]:
        """What the worker must know to start a forward after what it has."""
        return {
            "positions": positions,
            "padding": padding,
            "past": self._state.length,
            "select": self._state.select,
            "reserve": self.reserved,
        }

    def advance(self, source: torch.Tensor, positions: torch.Tensor, padding: torch.Tensor | None, epoch: int) -> None:
        """A forward of this source went through, and the edits that went along with it are done."""
        self.history.append(source, positions, padding)
        self._state.length += source.shape[1]
        self._state.batch = source.shape[0]
        self.built(epoch)
