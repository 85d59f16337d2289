"""In every split, attention masks work as in the unsplit model or are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, StaticCache

from llama_split import LlamaSplitError, SplitLlamaForCausalLM, UnsupportedBySplit
from llama_split.errors import InvalidInput
from llama_split.trusted.transformers_versions import CACHE_NAME
from llama_split.worker.sessions import SessionLimits
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.prompts import SHARED, padded_prompts, prompt

TOKENS = 60  # enough for three parts of a pipeline
CAUSAL = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()


def padding(left: int = 0, right: int = 0) -> torch.Tensor:
    """A mask of two rows, the first one padded."""
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :left] = 0
    mask[0, TOKENS - right :] = 0
    return mask


def holes() -> torch.Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, 5:9] = 0
    mask[1, 30:33] = 0
    return mask


def sees_nothing() -> torch.Tensor:
    mask = CAUSAL.clone()
    mask[:, :, 3] = False
    return mask


def each_head_its_own() -> torch.Tensor:
    return torch.rand(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.5


FLAT: dict[str, torch.Tensor | None] = {
    "none": None,
    "all": padding(),
    "left": padding(left=9),
    "left-bool": padding(left=9).bool(),
    "left-int32": padding(left=9).int(),
    "left-float": padding(left=9).float(),
    "right": padding(right=7),
    "holes": holes(),
    "a-row-of-zeros": padding(left=TOKENS),
    "one-row-for-all": torch.ones(1, TOKENS),
    "short": torch.ones(2, TOKENS - 5),
    "short-and-padded": padding(left=9)[:, : TOKENS - 5],
    "empty": torch.ones(2, 0),
    "long": torch.ones(2, TOKENS + 3),
    "long-and-zero": torch.cat([padding(), torch.zeros(2, 3)], dim=1),
}
PREPARED: dict[str, torch.Tensor] = {
    "causal": CAUSAL,
    "both-ways": torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool),
    "window": CAUSAL & torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(-6),
    "sees-nothing": sees_nothing(),
    "each-head-its-own": each_head_its_own(),
    "one-row": torch.ones(1, 1, 1, TOKENS, dtype=torch.bool),
    "least-number": torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
    "minus-infinity": torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~sees_nothing(), -torch.inf),
    "bias": each_head_its_own().float() + torch.zeros(TOKENS, TOKENS).masked_fill(~CAUSAL[0, 0], -torch.inf),
}
MASKS = {**FLAT, **PREPARED}
PACKED = torch.cat([torch.arange(25), torch.arange(20), torch.arange(15)])[None]
POSITIONS: dict[str, torch.Tensor | None] = {
    "none": None,
    "packed": PACKED,
    "packed-int32": PACKED.int(),
    "packed-otherwise-in-each-row": torch.stack([PACKED[0], torch.cat([torch.arange(3), torch.arange(57)])]),
    "later": torch.arange(TOKENS)[None] + 7,
    "all-the-same": torch.zeros(1, TOKENS, dtype=torch.int64),
    "backwards": torch.arange(TOKENS - 1, -1, -1)[None],
}
WAYS: dict[str, dict[str, Any]] = {
    "op": {"mode": "op"},
    "fused": {"mode": "fused"},
    "layer": {"mode": "layer"},
    "stack": {"mode": "stack"},
    "op-in-parts": {"mode": "op", "pipeline": 3},
    "fused-in-parts": {"mode": "fused", "pipeline": 3},
    "op-in-many-calls": {"mode": "op", "arena_bytes": 64 << 10},
    "layer-in-many-calls": {"mode": "layer", "arena_bytes": 32 << 10},
    "stack-in-many-calls": {"mode": "stack", "arena_bytes": 64 << 10},
}


@pytest.fixture(scope="module")
def served(plain: Small) -> Iterator[Worker]:
    """A worker of the small model for all tests of this module."""
    with worker_in_thread(plain.path) as running:
        yield running


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest, plain: Small, served: Worker) -> Iterator[SplitLlamaForCausalLM]:
    """The small model in each split, whole and cut."""
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=served.address, **request.param) as split:
        yield split


def outcome(model: LlamaForCausalLM, **inputs: Any) -> torch.Tensor | Exception:
    """Return the logits, or the error in their place."""
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(prompt(TOKENS, batch=2), **inputs).logits
            return logits
    except (RuntimeError, IndexError, LlamaSplitError) as error:
        return error


NAMED = ("static", "dynamic", "sliding_window")


def cached(name: str) -> dict[str, Any]:
    """How to generate with one of transformers' own caches."""
    return {**SHARED, "do_sample": False, "cache_implementation": name, "max_new_tokens": 8}


def inputs_of(mask: str, positions: str = "none", use_cache: bool | None = None) -> dict[str, Any]:
    """A forward's inputs, a mask and positions by their names."""
    return {"attention_mask": MASKS[mask], "position_ids": POSITIONS[positions], "use_cache": use_cache}


@functools.cache
def unsplit_outcome(plain: Small, *named: Any) -> torch.Tensor | Exception:
    """What the unsplit model makes of ``inputs_of(*named)``, once for all splits."""
    return outcome(plain.unsplit, **inputs_of(*named))


def assert_same(found: torch.Tensor | Exception, expected: torch.Tensor | Exception) -> None:
    """Check that all logits are equal, padded places included; where the unsplit model fails, expect our own error."""
    if isinstance(expected, Exception):
        assert isinstance(found, LlamaSplitError)
    else:
        assert isinstance(found, torch.Tensor), found
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# Positions without a mask say which texts are packed; beside one they only say where each token is.
COMBINED = [
    *(("none", positions) for positions in POSITIONS if positions != "none"),
    *((mask, p) for mask in ("left", "right") for p in ("packed", "packed-otherwise-in-each-row", "later")),
]


@pytest.mark.parametrize(("mask", "positions"), COMBINED)
def test_each_combination_of_mask_positions_and_cache_gives_the_unsplit_logits(
    plain: Small, way: SplitLlamaForCausalLM, mask: str, positions: str
) -> None:
    """Texts packed into a row see each other exactly where they do in the unsplit model."""
    for use_cache in (True, False):
        named = mask, positions, use_cache
        assert_same(outcome(way, **inputs_of(*named)), unsplit_outcome(plain, *named))


@pytest.mark.parametrize("mask", FLAT)
def test_a_mask_of_two_dimensions_means_what_it_means_unsplit(
    plain: Small, way: SplitLlamaForCausalLM, mask: str
) -> None:
    """Of any dtype and length: the same logits, or a refusal where the unsplit model fails; with a cache or without."""
    for use_cache in (True, False):
        named = mask, "none", use_cache
        assert_same(outcome(way, **inputs_of(*named)), unsplit_outcome(plain, *named))


@pytest.mark.parametrize("mask", PREPARED)
def test_a_mask_of_four_dimensions_means_what_it_means_unsplit(
    plain: Small, way: SplitLlamaForCausalLM, mask: str
) -> None:
    """Boolean or additive, causal or not; it can't cross, so a split whose worker attends refuses it by name."""
    found = outcome(way, **inputs_of(mask))
    if way.mode.worker_keeps_kv:
        assert isinstance(found, UnsupportedBySplit)
        assert "use mode fused" in str(found)
    else:
        assert_same(found, unsplit_outcome(plain, mask))


@pytest.mark.parametrize(
    "inputs",
    [
        {"attention_mask": torch.ones(TOKENS)},
        {"attention_mask": torch.ones(2, TOKENS, TOKENS)},
        {"attention_mask": torch.ones(3, TOKENS)},
        {"attention_mask": padding(left=9)[:1]},
        {"attention_mask": [[1] * TOKENS] * 2},
        {"attention_mask": CAUSAL.long()},
        {"attention_mask": CAUSAL.double()},
        {"attention_mask": CAUSAL[..., 1:]},
        {"attention_mask": CAUSAL.expand(3, 1, -1, -1)},
        {"attention_mask": CAUSAL.expand(1, 3, -1, -1)},
        {"position_ids": torch.arange(TOKENS)},
        {"position_ids": torch.arange(TOKENS - 1)[None]},
        {"position_ids": torch.arange(TOKENS)[None].expand(3, -1)},
        {"input_ids": torch.zeros(0, TOKENS, dtype=torch.int64)},
        {"input_ids": torch.zeros(2, 0, dtype=torch.int64)},
        {"input_ids": torch.zeros(TOKENS, dtype=torch.int64)},
    ],
    ids=lambda inputs: " ".join(f"{name}{list(getattr(value, 'shape', []))}" for name, value in inputs.items()),
)
def test_what_fits_no_forward_is_refused_in_the_same_line_by_all_splits(
    lasting_split: SplitLlamaForCausalLM, inputs: dict[str, Any]
) -> None:
    """Shapes, dtypes and kinds that don't go with the tokens, and batches without tokens: one of our own errors."""
    with pytest.raises(InvalidInput) as caught:
        lasting_split(**{"input_ids": prompt(TOKENS, batch=2), **inputs})
    assert isinstance(caught.value, ValueError)
    assert next(iter(inputs)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def cached_right(plain: Small) -> dict[str, torch.Tensor]:
    """What the unsplit model generates with each cache of transformers that may be named."""
    return {name: plain.unsplit.generate(**padded_prompts(), **cached(name)) for name in NAMED}


def test_the_mask_of_a_static_cache_hides_what_it_hides_unsplit(
    way: SplitLlamaForCausalLM, cached_right: dict[str, torch.Tensor]
) -> None:
    """For a cache of fixed size, partly filled, generate prepares a boolean mask itself."""
    for name, expected in cached_right.items():
        assert torch.equal(way.generate(**padded_prompts(), **cached(name)), expected)


@pytest.mark.parametrize("mode", ["op", "fused"])
def test_attention_weights_over_a_static_cache_are_those_of_the_unsplit_model(
    plain: Small, plain_split: SplitLlamaForCausalLM
) -> None:
    """Eager attention needs an additive mask, so the boolean one is converted; padded rows too."""
    options = {**SHARED, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    eager = LlamaForCausalLM.from_pretrained(plain.path, attn_implementation="eager")
    outputs = [
        model.generate(**padded_prompts(), **options, cache_implementation="static") for model in (plain_split, eager)
    ]
    for token in (0, 5):
        for mine, right in zip(outputs[0].attentions[token], outputs[1].attentions[token], strict=True):
            torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["op", "fused"])
def test_a_callers_own_static_cache_works_as_unsplit(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Called by hand, with a mask of two dimensions and with a boolean one of four."""

    def run(model: LlamaForCausalLM) -> Iterator[torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=30)
        inputs = padded_prompts()
        yield model(**inputs, **{CACHE_NAME: cache}).logits
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.int64)], dim=1)
        yield model(prompt(2, batch=3, seed=4), attention_mask=mask, **{CACHE_NAME: cache}).logits
        prepared = torch.zeros(3, 1, 2, 30, dtype=torch.bool)
        prepared[:, :, :, 3:16] = True
        prepared[:, :, 0, 15] = False
        yield model(prompt(2, batch=3, seed=5), attention_mask=prepared, **{CACHE_NAME: cache}).logits

    with torch.no_grad():
        for found, expected in zip(run(plain_split), run(plain.unsplit), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["layer", "stack"])
def test_packed_texts_stay_apart_when_their_kv_is_built_again(plain: Small, mode: str) -> None:
    """The worker loses the first calls' KV in the middle of a forward without a cache, which takes several calls."""
    with (
        worker_in_thread(plain.path) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode, arena_bytes=32768) as split,
    ):
        submit, sent = split.workers[0].client.submit, 0

        def losing(method: str, *arguments: Any, **keywords: Any) -> Any:
            nonlocal sent
            if "start" in keywords and keywords["start"]["past"] > 30 and not sent:
                sent += 1
                client = next(iter(worker.service.sessions._sessions))[0]
                worker.service.sessions.end_connection(client)
            return submit(method, *arguments, **keywords)

        split.workers[0].client.submit = losing  # type: ignore[method-assign]
        inputs = {"position_ids": POSITIONS["packed-otherwise-in-each-row"], "use_cache": False}
        assert_same(outcome(split, **inputs), outcome(plain.unsplit, **inputs))
        assert sent == 1


@pytest.mark.parametrize("mode", ["layer", "stack"])
@pytest.mark.parametrize("edit", ["none", "crop", "reorder", "crop-to-the-change"])
def test_kv_is_built_again_with_the_masks_that_its_tokens_had(plain: Small, mode: str, edit: str) -> None:
    """A caller may change the mask of tokens that are cached: what came before the change attended by the old one."""

    def run(model: LlamaForCausalLM, cache: Any, lose: Callable[[], None]) -> torch.Tensor:
        first, second = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 14, dtype=torch.int64)
        first[0, :3] = 0
        second[1, 2:6] = 0
        cache = model(prompt(9, batch=2), attention_mask=first, **{CACHE_NAME: cache}, use_cache=True)[CACHE_NAME]
        model(prompt(5, batch=2, seed=2), attention_mask=second, **{CACHE_NAME: cache})
        if edit.startswith("crop"):
            cache.crop(-5 if edit == "crop-to-the-change" else -7)
        if edit == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        lose()
        logits: torch.Tensor = model(prompt(4, batch=2, seed=3), **{CACHE_NAME: cache}).logits
        return logits

    with (
        worker_in_thread(plain.path, limits=SessionLimits(max_sessions=1, idle_s=0.0)) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode) as split,
        torch.no_grad(),
    ):
        found = run(split, None, lambda: split(prompt(3)))  # another session takes the only place
        expected = run(plain.unsplit, None, lambda: None)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
