"""Forwards of transformers' continuous batching: one row that holds the new tokens of several requests.

Each request's KV has its place in transformers' paged cache, which is filled and read by indices that come with every
forward. Where this side attends, in op and fused, it is there. In layer and stack the workers keep it, and the tables
of the cache only tell which request a token belongs to.

Shape suffixes: B batch, T tokens, G key/value heads, S tokens attended to, d head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
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


class BatchedRequest(NamedTuple):
    """One request of a forward: its name, how many tokens of the row are its own, and how many came before."""

    request_id: str
    tokens: int
    past: int


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

    def watch(self, freed: Callable[[str], None]) -> None:
        """Have ``freed`` called with the name of each request whose place in the cache is freed, from now on."""
        if not isinstance(self._cache.free_blocks, _Watched):
            self._cache.free_blocks = _Watched(self._cache.free_blocks, freed)

    @property
    def _allocator(self) -> Any:
        (allocator,) = self._cache.cache_allocators.values()  # one for each kind of attention
        return allocator

    def requests(self, cached: Mapping[str, int]) -> list[BatchedRequest]:
        """The requests of this forward, in the order of their tokens.

        A request is known by the place that its first token is written to, which no other request has.

        Args:
            cached: how many tokens of each request went before, by its name.

        Raises:
            UnsupportedBySplit: a request continues from tokens that did not go through this model.
        """
        allocator = self._allocator
        owners = {}
        for name, blocks in allocator.block_table.items():
            for past in {0, cached.get(name, 0)}:
                if past < len(blocks) * allocator.tokens_per_page:
                    owners[allocator.get_write_indices(name, past, 1)[0]] = name
        ends = self._keywords["cu_seq_lens_q"].tolist()
        ends_of_keys = self._keywords["cu_seq_lens_k"][allocator.layer_type].tolist()
        places = self._keywords["write_index"][allocator.index].tolist()
        found = []
        for (first, end), (first_key, end_key) in zip(pairwise(ends), pairwise(ends_of_keys), strict=True):
            name, past = owners.get(places[first]), end_key - first_key - (end - first)
            if name is None or past not in (0, cached.get(name, 0)):
                raise UnsupportedBySplit("a request continues from tokens whose KV the worker does not have")
            found.append(BatchedRequest(name, end - first, past))
        return found


class _Watched:
    """A cache's ``free_blocks`` that tells of each request."""

    def __init__(self, free_blocks: Callable[..., None], freed: Callable[[str], None]) -> None:
        self._free_blocks = free_blocks
        self._freed = freed

    def __call__(self, request_id: str, *arguments: Any, **keywords: Any) -> None:
        self._free_blocks(request_id, *arguments, **keywords)
        self._freed(request_id)


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


def fit_batching(
    config: ContinuousBatchingConfig | None,
    generation: GenerationConfig | None,
    mode: Mode,
    most_sessions: int,
    *,
    hides: bool = False,
) -> ContinuousBatchingConfig | None:
    """What the scheduler is to do: as told, but no request shares another's KV where the workers keep it.

    Nor does it under a shield that hides texts: which ones begin alike would show in how many tokens cross.

    Args:
        config: what the caller has passed; None: transformers' defaults.
        generation: what the caller has passed.
        mode: the split.
        most_sessions: how many requests the workers have room for at once.
        hides: whether a shield hides texts from the workers.

    Raises:
        UnsupportedBySplit: what is asked for needs the KV on this side.
    """
    if not mode.worker_keeps_kv and not hides:
        return config
    config = getattr(generation, "continuous_batching_config", None) if config is None else config
    config = ContinuousBatchingConfig() if config is None else copy.copy(config)
    config.allow_block_sharing = False
    if not mode.worker_keeps_kv:
        return config
    refused = {
        "cpu_offload_space": config.cpu_offload_space,
        "num_return_sequences": generation is not None and (generation.num_return_sequences or 1) > 1,
    }
    for name, value in refused.items():
        if value:
            raise UnsupportedBySplit(
                f"{name} in continuous batching in mode {mode.value}: the worker keeps the KV; use mode fused or op"
            )
    config.max_requests_per_batch = min(config.max_requests_per_batch or most_sessions, most_sessions)
    return config
