"""Forwards of transformers' continuous batching: one row that holds the new tokens of several requests.

Each request's KV is in transformers' paged cache, which its scheduler fills and reads by indices that come with every
forward. So these forwards are for the splits where this side attends: op and fused.

Shape suffixes: B batch, T tokens, G key/value heads, S tokens attended to, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ..boundary.operations import Mode
from ..errors import UnsupportedBySplit

_KEYWORDS = (
    "block_table",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "logits_indices",
    "logits_processor_args",
    "max_length_k",
    "max_length_q",
    "read_index",
    "write_index",
)
"""What the scheduler passes with every forward besides the usual arguments."""


class PagedCache:
    """The paged cache during one forward, as the layers of a split use a cache.

    Args:
        cache: transformers' own.
        keywords: what the scheduler has passed with this forward.
    """

    def __init__(self, cache: PagedAttentionCache, keywords: dict[str, Any]) -> None:
        self._cache = cache
        self._keywords = keywords

    def update(self, key_BGTd: torch.Tensor, value_BGTd: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys and values of the new tokens; return those of all tokens of these requests, [B, G, S, d]."""
        keys, values = self._cache.update(key_BGTd, value_BGTd, layer, kwargs=dict(self._keywords))
        return keys, values


def take_paged(cache: Any, keywords: dict[str, Any]) -> PagedCache | None:
    """The paged cache of a forward, with the scheduler's keywords, which are taken out; None if it is no such forward.

    Raises:
        UnsupportedBySplit: the scheduler counts on an attention function that reads the cache by itself.
    """
    if not isinstance(cache, PagedAttentionCache):
        return None
    taken = {name: keywords.pop(name) for name in _KEYWORDS if name in keywords}
    if taken.get("block_table") is not None:
        raise UnsupportedBySplit("continuous batching by a block table needs flash attention, which no split has")
    return PagedCache(cache, taken)


def check_batching(mode: Mode) -> None:
    """Refuse continuous batching where the worker keeps the KV.

    Raises:
        UnsupportedBySplit: this mode can't.
    """
    if mode.worker_keeps_kv:
        raise UnsupportedBySplit(
            f"continuous batching in mode {mode.value}: the worker keeps the KV, but transformers' scheduler keeps it "
            "on this side: use mode fused or op"
        )
