"""A KV cache that is allocated once for a whole generation.

Attention sees a view of the filled part, so unused capacity costs no time. Where the final length is not known in
advance, the capacity doubles when it is used up. As a subclass of transformers' ``Cache`` it works with generation,
masks, beams and cropping like any other. The trusted side uses it where it attends itself, the worker where it keeps
the KV.

Shape suffixes: B batch, G key/value heads, S cached positions, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_FIRST_CAPACITY = 128


def _buffer(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Allocate outside inference mode: a tensor allocated in that mode can be written in that mode only."""
    with torch.inference_mode(mode=False):
        return like.new_empty(tuple(shape))


class GrowingLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [B, G, S, d] each, allocated for ``reserved`` positions per row at first use."""

    is_croppable = True
    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, reserved: int = 0) -> None:
        super().__init__()
        self.reserved = reserved
        self._length = 0
        self._key_buffer = self._value_buffer = torch.empty(0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._key_buffer = _buffer((*key_states.shape[:2], 0, key_states.shape[3]), key_states)
        self._value_buffer = _buffer((*value_states.shape[:2], 0, value_states.shape[3]), value_states)
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
            capacity = self.capacity_for(key_states.shape[0], end)
            self._key_buffer = self._grown(self._key_buffer, capacity)
            self._value_buffer = self._grown(self._value_buffer, capacity)
        self._key_buffer[:, :, self._length : end] = key_states
        self._value_buffer[:, :, self._length : end] = value_states
        self._length = end
        return self._update_views()

    def capacity_for(self, batch: int, length: int) -> int:
        """The positions per row that will be allocated once a batch of this size has ``length`` of them cached."""
        capacity = self._key_buffer.shape[2] if self.is_initialized else 0
        if self._length == 0 and batch != self._key_buffer.shape[0]:
            capacity = 0
        return capacity if length <= capacity else max(_FIRST_CAPACITY, length, 2 * capacity, self.reserved)

    @property
    def batch(self) -> int:
        """The number of rows it has memory for."""
        return self._key_buffer.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return self._key_buffer.nbytes + self._value_buffer.nbytes

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions. After 0, the next forward may have a batch of any size."""
        self._length = length
        if self.is_initialized:
            self._update_views()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` positions: transformers passes the count as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        self.truncate(max(self._length + tokens_to_remove, 0))

    def reset(self) -> None:
        self._length = 0
        self._key_buffer = self._value_buffer = torch.empty(0)
        self.keys = self.values = None
        self.is_initialized = False

    def select(self, rows: torch.Tensor) -> None:
        """Replace the batch by these rows of it."""
        if self.is_initialized:
            rows = rows.to(self._key_buffer.device)
            self._key_buffer = self._selected(self._key_buffer, rows)
            self._value_buffer = self._selected(self._value_buffer, rows)
            self._update_views()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self._key_buffer.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(torch.arange(self._key_buffer.shape[0])[indices.cpu()])

    def __deepcopy__(self, _memo: dict[int, Any]) -> GrowingLayer:
        copied = GrowingLayer(self.reserved)
        copied.is_initialized, copied._length = self.is_initialized, self._length
        if self.is_initialized:
            copied._key_buffer = self._grown(self._key_buffer, self._key_buffer.shape[2])
            copied._value_buffer = self._grown(self._value_buffer, self._value_buffer.shape[2])
            copied._update_views()
        return copied

    def _grown(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        grown = _buffer((*buffer.shape[:2], capacity, buffer.shape[3]), buffer)
        grown[:, :, : self._length] = buffer[:, :, : self._length]
        return grown

    def _selected(self, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        selected = _buffer((len(rows), *buffer.shape[1:]), buffer)
        selected[:, :, : self._length] = buffer[:, :, : self._length][rows]
        return selected

    def _update_views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Set ``keys`` and ``values``, the views of the filled part that transformers reads."""
        self.keys = self._key_buffer[:, :, : self._length]
        self.values = self._value_buffer[:, :, : self._length]
        return self.keys, self.values


class GrowingCache(Cache):  # type: ignore[misc]
    """``layers`` layers of ``GrowingLayer``, allocated for ``reserved`` positions per row at first use."""

    def __init__(self, layers: int, reserved: int = 0) -> None:
        super().__init__(layers=[GrowingLayer(reserved) for _ in range(layers)])

    @property
    def batch(self) -> int:
        """The number of rows it holds; 0 before the first use."""
        return int(self.layers[0].batch)

    @property
    def nbytes(self) -> int:
        """Bytes of memory allocated."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, positions: int) -> None:
        """Allocate at least ``positions`` positions per row the next time that the cache has to grow."""
        for layer in self.layers:
            layer.reserved = positions

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` positions of every layer."""
        for layer in self.layers:
            layer.truncate(length)

    def select(self, rows: torch.Tensor) -> None:
        """Replace the batch by these rows of it."""
        for layer in self.layers:
            layer.select(rows)
