"""A KV cache that neither copies itself for each token, as a concatenating one does, nor fixes its length beforehand.

Each layer keeps keys and values in buffers whose capacity doubles; what attention sees is a view of the filled part.
It is a cache of transformers, so that generation, masks, beams and cropping work with it as with any other. Both
sides use it: the trusted side where attention is its own, the worker where it keeps the KV.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_FIRST_CAPACITY = 128


class GrowingLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [B, G, S, d] each."""

    is_croppable = True
    is_sliding = False
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._length = 0
        self._key_buffer = torch.empty(0)
        self._value_buffer = torch.empty(0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._key_buffer = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self._value_buffer = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._length == 0 and self._key_buffer.shape[:1] != key_states.shape[:1]:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self._key_buffer.shape[0]:
            raise ValueError(f"the cache holds a batch of {self._key_buffer.shape[0]}, not of {key_states.shape[0]}")
        end = self._length + key_states.shape[2]
        if end > self._key_buffer.shape[2]:
            capacity = max(_FIRST_CAPACITY, end, 2 * self._length)
            self._key_buffer = self._grown(self._key_buffer, capacity)
            self._value_buffer = self._grown(self._value_buffer, capacity)
        self._key_buffer[:, :, self._length : end] = key_states
        self._value_buffer[:, :, self._length : end] = value_states
        self._length = end
        return self._show()

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions; after none, a batch of any size may follow."""
        self._length = length
        if self.is_initialized:
            self._show()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` positions, as in transformers a number that is not positive."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        self.truncate(max(self._length + tokens_to_remove, 0))

    def reset(self) -> None:
        self._length = 0
        self._key_buffer = self._value_buffer = torch.empty(0)
        self.keys = self.values = None
        self.is_initialized = False

    def select(self, rows: torch.Tensor) -> None:
        """Make the batch of these rows of the present one."""
        if self.is_initialized:
            self._key_buffer = self._key_buffer.index_select(0, rows.to(self._key_buffer.device))
            self._value_buffer = self._value_buffer.index_select(0, rows.to(self._value_buffer.device))
            self._show()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self._key_buffer.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(torch.arange(self._key_buffer.shape[0])[indices.cpu()])

    def _grown(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        grown = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[3]))
        grown[:, :, : self._length] = buffer[:, :, : self._length]
        return grown

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the views that transformers knows as ``keys`` and ``values``."""
        self.keys = self._key_buffer[:, :, : self._length]
        self.values = self._value_buffer[:, :, : self._length]
        return self.keys, self.values


class GrowingCache(Cache):  # type: ignore[misc]
    """A ``GrowingLayer`` for each of ``layers`` layers."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(layers)])

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions of every layer."""
        for layer in self.layers:
            layer.truncate(length)

    def select(self, rows: torch.Tensor) -> None:
        """Make the batch of these rows of the present one."""
        for layer in self.layers:
            layer.select(rows)
