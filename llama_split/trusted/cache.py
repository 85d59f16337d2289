"""The trusted side's stand-in for a KV cache that the worker keeps."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedBySplit


class _RemoteLayer(CacheLayerMixin):  # type: ignore[misc]
    """Knows how long the worker's cache is, and what to do to it before the next forward."""

    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
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
        self._keep(max(self.length + tokens_to_remove, 0))

    def reset(self) -> None:
        self._keep(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._go_on_with(beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._go_on_with(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._go_on_with(torch.arange(self.batch)[indices.cpu()])

    def _keep(self, length: int) -> None:
        self.length = length
        if length == 0:  # the next forward starts anew, with a batch of any size
            self.select = None

    def _go_on_with(self, rows: torch.Tensor) -> None:
        rows = rows.to(torch.int64)
        if self.length:
            self.select = rows if self.select is None else self.select[rows]
            self.batch = rows.shape[0]


class RemoteCache(Cache):  # type: ignore[misc]
    """A session's KV on the worker, as transformers wants to see it.

    When this object dies, its number is put into ``ended``; whoever talks to the worker next ends the session there.
    """

    def __init__(self, session: int, ended: deque[int]) -> None:
        self._state = _RemoteLayer()
        super().__init__(layers=[self._state])
        self.session = session
        self._ended = ended
        weakref.finalize(self, ended.append, session).atexit = False

    def is_of(self, ended: deque[int]) -> bool:
        """Whether the session is one of the connection whose ended sessions go here."""
        return self._ended is ended

    def __copy__(self) -> RemoteCache:
        raise UnsupportedBySplit("the KV is the worker's and can't be copied; generate each continuation from its text")

    def __deepcopy__(self, _memo: dict[int, Any]) -> RemoteCache:
        return self.__copy__()

    def start(self, positions: torch.Tensor, padding: torch.Tensor | None) -> dict[str, Any]:
        """What the worker must know to start a forward; the edits in it are then done."""
        select, self._state.select = self._state.select, None
        return {"positions": positions, "padding": padding, "past": self._state.length, "select": select}

    def advance(self, batch: int, tokens: int) -> None:
        """A forward of ``tokens`` tokens went through."""
        self._state.length += tokens
        self._state.batch = batch
