"""Stands in, on the trusted side, for a KV cache that the worker keeps."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from ..boundary.operations import Mode
from ..errors import UnsupportedBySplit
from .history import ForwardInput, History

_NOWHERE = -1  # no connection's epoch


class _RemoteLayer(CacheLayerMixin):  # type: ignore[misc]
    """The length and batch of the workers' cache, and for each worker the rows to select before its next forward."""

    is_croppable = True
    is_sliding = False

    def __init__(self, history: History, workers: int) -> None:
        super().__init__()
        self.history = history
        self.length = 0
        self.batch = 0
        self.selects: list[torch.Tensor | None] = [None] * workers

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise UnsupportedBySplit("this cache lives on the worker: keys and values can't be added to it from this side")

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
        self._select(beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(self.batch)[indices.cpu()])

    def forget_after(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length < self.length:
            self.history.crop(length)
        self.length = length
        if length == 0:  # the next forward starts over, with a batch of any size
            self.selects = [None] * len(self.selects)

    def _select(self, rows: torch.Tensor) -> None:
        rows = rows.to(torch.int64)
        if self.length:
            self.history.select(rows)
            self.selects = [rows if earlier is None else earlier[rows] for earlier in self.selects]
            self.batch = rows.shape[0]


class SessionIds:
    """Gives out the ids of one model's sessions, and collects in ``ended`` those whose cache was dropped.

    A session has the same id at all ``workers`` workers.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.ended: deque[int] = deque()
        self._counter = itertools.count(1)

    def new(self) -> int:
        """An id that was not given out before."""
        return next(self._counter)


class RemoteCache(Cache):  # type: ignore[misc]
    """A session's KV on the workers, with the interface of a transformers ``Cache``.

    When this object dies, the model's next forward ends the session. A copy is a session of its own, which is built on
    the workers when it is first used.

    A worker may hold more tokens than this cache stands for, after a forward that failed at a later worker: each
    forward tells how many to continue.

    Args:
        ids: gives out the session's id.
        reserved: the number of tokens that a row is expected to have in the end.
        history: what the session's KV was made of; None: nothing yet.
    """

    def __init__(self, ids: SessionIds, reserved: int = 0, history: History | None = None) -> None:
        self._state = _RemoteLayer(History() if history is None else history, ids.workers)
        super().__init__(layers=[self._state])
        self.session_id = ids.new()
        self.reserved = reserved
        self._ids = ids
        # For each worker, that of the connection over which its KV is what this cache stands for.
        self._epochs = [_NOWHERE] * ids.workers
        self._at_death = weakref.finalize(self, ids.ended.append, self.session_id)
        self._at_death.atexit = False

    def end(self) -> None:
        """Have the model's next forward end the session, though something may still refer to this object."""
        self._at_death()

    @property
    def history(self) -> History:
        """What the workers' KV can be rebuilt from."""
        return self._state.history

    def is_of(self, ids: SessionIds) -> bool:
        """True if ``ids`` gave out the id of this session."""
        return self._ids is ids

    def to_rebuild(self, epochs: Sequence[int]) -> int:
        """How many workers, from the first, must go through all tokens again: up to the last that lacks them.

        ``epochs`` are those of the connections.
        """
        if self._state.length == 0:
            return 0
        lacking = [index for index, epoch in enumerate(epochs) if self._epochs[index] != epoch]
        return max(lacking, default=-1) + 1

    def unknown(self, worker: int) -> None:
        """Note that a worker is about to change its KV: unless ``known`` follows, the next forward rebuilds it."""
        self._epochs[worker] = _NOWHERE

    def known(self, worker: int, epoch: int) -> None:
        """Note that a worker has what this cache stands for, selected rows included."""
        self._epochs[worker] = epoch
        self._state.selects[worker] = None

    def start(self, tokens: ForwardInput, past: int, worker: int) -> dict[str, Any]:
        """What a worker must know to continue the session with these tokens.

        Args:
            tokens: a chunk of a forward.
            past: how many tokens precede the chunk.
            worker: its index; rows are selected before a forward's first chunk.
        """
        select = self._state.selects[worker] if past == self._state.length else None
        return {**tokens.start(), "past": past, "select": select, "reserve": self.reserved}

    def append(self, tokens: ForwardInput) -> None:
        """Note that the workers have continued the session with these tokens."""
        self.history.append(tokens)
        self._state.batch, count = tokens.source.shape[:2]
        self._state.length += count

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens, after a forward that failed."""
        self._state.forget_after(length)
        self._epochs = [_NOWHERE] * len(self._epochs)

    def __copy__(self) -> RemoteCache:
        copied = RemoteCache(self._ids, self.reserved, self.history.copy())
        copied._state.length, copied._state.batch = self._state.length, self._state.batch
        return copied

    def __deepcopy__(self, _memo: dict[int, Any]) -> RemoteCache:
        return self.__copy__()


def refuse_cache_implementation(name: str | None, mode: Mode) -> None:
    """Refuse a ``cache_implementation`` of transformers that the worker's KV can't stand in for.

    Raises:
        UnsupportedBySplit: that cache computes other numbers or keeps them elsewhere.
    """
    if name not in (None, "dynamic") and (name not in ALL_STATIC_CACHE_IMPLEMENTATIONS or "offloaded" in name):
        raise UnsupportedBySplit(
            f"cache_implementation={name!r}: in mode {mode.value} the worker keeps the KV; use 'dynamic' or 'static', "
            "or mode fused"
        )
