"""The trusted side's stand-in for a KV cache that the worker keeps."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from ..errors import UnsupportedBySplit
from ..operations import Mode
from .history import History, Tokens

_NOWHERE = -1


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

    def start(self, tokens: Tokens) -> dict[str, Any]:
        """What the worker must know to start a forward of these tokens after what it has."""
        return {
            **tokens.start(),
            "past": self._state.length,
            "select": self._state.select,
            "reserve": self.reserved,
        }

    def advance(self, tokens: Tokens, epoch: int) -> None:
        """A forward of these tokens went through, and the edits that went along with it are done."""
        self.history.append(tokens)
        self._state.length += tokens.source.shape[1]
        self._state.batch = tokens.source.shape[0]
        self.built(epoch)


def refuse_cache_implementation(name: str | None, mode: Mode) -> None:
    """Refuse a cache of transformers by its name, unless the worker's KV gives what it gives.

    Raises:
        UnsupportedBySplit: its numbers or its place would be others.
    """
    if name not in (None, "dynamic") and (name not in ALL_STATIC_CACHE_IMPLEMENTATIONS or "offloaded" in name):
        raise UnsupportedBySplit(
            f"cache_implementation={name!r}: in mode {mode.value} the worker keeps the KV; use 'dynamic' or 'static', "
            "or mode fused"
        )
