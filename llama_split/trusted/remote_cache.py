"""Stands in, on the trusted side, for a KV cache that the worker keeps."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Iterator
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
    """The length and batch of the worker's cache, and the rows to select there before the next forward."""

    is_croppable = True
    is_sliding = False

    def __init__(self, history: History) -> None:
        super().__init__()
        self.history = history
        self.length = 0
        self.batch = 0
        self.select: torch.Tensor | None = None

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
            self.select = None

    def _select(self, rows: torch.Tensor) -> None:
        rows = rows.to(torch.int64)
        if self.length:
            self.history.select(rows)
            self.select = rows if self.select is None else self.select[rows]
            self.batch = rows.shape[0]


class SessionIds:
    """Gives out the ids of one model's sessions, and collects in ``ended`` those whose cache was dropped."""

    def __init__(self) -> None:
        self.ended: deque[int] = deque()
        self._counter = itertools.count(1)

    def new(self) -> int:
        """An id that was not given out before."""
        return next(self._counter)


class RemoteCache(Cache):  # type: ignore[misc]
    """A session's KV on the worker, with the interface of a transformers ``Cache``.

    When this object dies, the model's next forward ends the session. A copy is a session of its own, which is built on
    the worker when it is first used.

    Args:
        ids: gives out the session's id.
        reserved: the number of tokens that a row is expected to have in the end.
        history: what the session's KV was made of; None: nothing yet.
    """

    def __init__(self, ids: SessionIds, reserved: int = 0, history: History | None = None) -> None:
        self._state = _RemoteLayer(History() if history is None else history)
        super().__init__(layers=[self._state])
        self.session_id = ids.new()
        self.reserved = reserved
        self._ids = ids
        self._epoch = _NOWHERE  # of the connection over which the worker's KV is what this cache stands for
        weakref.finalize(self, ids.ended.append, self.session_id).atexit = False

    @property
    def history(self) -> History:
        """What the worker's KV can be rebuilt from."""
        return self._state.history

    def is_of(self, ids: SessionIds) -> bool:
        """True if ``ids`` gave out the id of this session."""
        return self._ids is ids

    def must_be_rebuilt(self, epoch: int) -> bool:
        """True if the worker behind the connection of this epoch lacks what this cache stands for."""
        return self._state.length > 0 and self._epoch != epoch

    def rebuilt(self, epoch: int) -> None:
        """Note that the worker has what this cache stands for, selected rows included."""
        self._epoch = epoch
        self._state.select = None

    def start(self, tokens: ForwardInput) -> dict[str, Any]:
        """What the worker must know to continue the session with these tokens."""
        return {
            **tokens.start(),
            "past": self._state.length,
            "select": self._state.select,
            "reserve": self.reserved,
        }

    @contextlib.contextmanager
    def forward(self, tokens: ForwardInput, epoch: int) -> Iterator[None]:
        """Within the block the worker continues the session with these tokens.

        If the block fails, what the worker holds is unknown: the cache keeps its length and is rebuilt by the next
        forward.
        """
        self._epoch = _NOWHERE
        yield
        self.history.append(tokens)
        self._state.batch, count = tokens.source.shape[:2]
        self._state.length += count
        self.rebuilt(epoch)

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens, after a forward that failed."""
        self._state.forget_after(length)
        self._epoch = _NOWHERE

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
