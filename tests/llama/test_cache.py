"""``GrowingCache`` behaves in transformers as ``DynamicCache`` does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from llama_split.model.kv_cache import GrowingCache

LAYERS = 2
HEADS, WIDTH = 2, 4

steps = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 2, 7, 100, 130, 300])),
    st.tuples(st.just("crop"), st.sampled_from([0, 1, 3, 150])),
    st.tuples(st.just("reorder"), st.integers(0, 1000)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("select"), st.integers(0, 1000)),
)


class Pair:
    """A growing and a dynamic cache that get the same edits."""

    def __init__(self) -> None:
        self.growing = GrowingCache(LAYERS)
        self.dynamic = DynamicCache()
        self.generator = torch.Generator().manual_seed(0)
        self.batch = 2

    def random(self, tokens: int, batch: int | None = None) -> torch.Tensor:
        return torch.randn((batch or self.batch, HEADS, tokens, WIDTH), generator=self.generator)

    def update(self, tokens: int) -> None:
        for layer in range(LAYERS):
            keys, values = self.random(tokens), self.random(tokens)
            shown = self.growing.update(keys, values, layer)
            expected = self.dynamic.update(keys, values, layer)
            assert torch.equal(shown[0], expected[0])
            assert torch.equal(shown[1], expected[1])

    def apply(self, step: str, number: int) -> None:
        rows = torch.randint(0, self.batch, (self.batch,), generator=torch.Generator().manual_seed(number))
        if step == "update":
            self.update(number)
        elif step == "crop":
            for cache in (self.growing, self.dynamic):
                cache.crop(-number)
        elif step == "reorder":
            for cache in (self.growing, self.dynamic):
                cache.reorder_cache(rows)
        elif step == "repeat" and self.batch * number <= 12:
            for cache in (self.growing, self.dynamic):
                cache.batch_repeat_interleave(number)
            self.batch *= number
        elif step == "select":
            kept = rows[: 1 + number % self.batch]
            for cache in (self.growing, self.dynamic):
                cache.batch_select_indices(kept)
            self.batch = len(kept)

    def agree(self) -> None:
        length = self.dynamic.get_seq_length()
        assert self.growing.get_seq_length() == length
        assert [self.growing.get_mask_sizes(5, layer) for layer in range(LAYERS)] == [
            self.dynamic.get_mask_sizes(5, layer) for layer in range(LAYERS)
        ]
        for mine, theirs in zip(self.growing.layers, self.dynamic.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)


@given(st.lists(steps, max_size=12))
@settings(max_examples=60)
def test_any_sequence_of_edits_leaves_what_a_dynamic_cache_has(sequence: list[tuple[str, int]]) -> None:
    """Keys, values, lengths and mask sizes equal those of transformers' cache after every step."""
    pair = Pair()
    pair.update(3)
    for step, number in sequence:
        if pair.dynamic.get_seq_length() == 0 and step != "update":
            continue  # without tokens a dynamic cache has no batch to edit
        pair.apply(step, number)
        pair.agree()


def test_a_fresh_cache_is_empty_and_may_be_edited() -> None:
    """The edits that transformers may make before the first forward have no effect."""
    cache = GrowingCache(LAYERS)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    cache.crop(0)
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_repeat_interleave(3)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_crop_refuses_a_positive_number() -> None:
    """As in transformers, whose crop once took the final length: a caller from that time must not lose tokens."""
    with pytest.raises(ValueError, match="minus the number"):
        GrowingCache(LAYERS).crop(3)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_after_reset_a_cache_takes_a_batch_of_any_size(batch: int) -> None:
    """A reset cache is as a new one, whatever batch it held before."""
    pair = Pair()
    pair.update(3)
    for cache in (pair.growing, pair.dynamic):
        cache.reset()
    pair.batch = batch
    pair.update(4)
    pair.agree()


def test_a_batch_of_another_size_is_refused_not_broadcast() -> None:
    """One row's keys must never be written to all rows of a larger batch."""
    pair = Pair()
    pair.update(3)
    one = pair.random(1, batch=1)
    with pytest.raises(RuntimeError):
        pair.dynamic.update(one, one, 0)
    with pytest.raises((RuntimeError, ValueError)):
        pair.growing.update(one, one, 0)


def test_a_deep_copy_goes_on_alone() -> None:
    """A prompt's cache may be copied, and original and copy continued differently."""
    pair = Pair()
    pair.update(3)
    kept = [layer.keys.clone() for layer in pair.growing.layers]
    copied = copy.deepcopy(pair.growing)
    pair.update(2)
    assert copied.get_seq_length() == 3
    new = pair.random(1)
    for layer, before in enumerate(kept):
        keys, _ = copied.update(new, new, layer)
        assert torch.equal(keys, torch.cat([before, new], dim=2))
    pair.agree()


EDITS: dict[str, Callable[[GrowingCache], object]] = {
    "nothing": lambda cache: cache,
    "crop": lambda cache: cache.crop(-1),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([0, 3]))),
    "copy": copy.deepcopy,
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("again", EDITS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("tokens", [1, 300], ids=["within", "growing"])
def test_a_cache_filled_in_inference_mode_may_be_used_outside(edit: str, again: str, tokens: int) -> None:
    """And the other way round, after any edit: no mode allocates memory that only it may write."""

    def use(cache: GrowingCache, name: str, tokens: int) -> GrowingCache:
        found = EDITS[name](cache)
        cache = found if isinstance(found, GrowingCache) else cache
        for layer in range(LAYERS):
            keys, _ = cache.update(*torch.zeros(2, 2, HEADS, tokens, WIDTH), layer)
            assert not keys.is_inference()
        return cache

    for first, second in ((True, False), (False, True)):
        cache = GrowingCache(LAYERS)
        with torch.inference_mode(mode=first):
            cache = use(use(cache, "nothing", 3), edit, 1)
        with torch.inference_mode(mode=second):
            cache = use(cache, again, tokens)
        use(cache, "nothing", 1)


def test_growth_does_not_reallocate_for_each_token() -> None:
    """Capacity doubles: a thousand tokens one by one take a handful of buffers."""
    cache = GrowingCache(1)
    token = torch.zeros(1, HEADS, 1, WIDTH)
    buffers = set()
    for _ in range(1000):
        keys, _ = cache.update(token, token, 0)
        buffers.add(keys.untyped_storage().data_ptr())
    assert len(buffers) <= 5
