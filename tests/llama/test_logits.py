"""Small random models: ``forward`` gives the same results split and unsplit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import Mode
from llama_split.trusted.transformers_versions import CACHE_NAME
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.prompts import SHARED, padded_prompts, prompt, single_prompt


def test_logits_of_a_direct_call_are_those_of_the_unsplit_model(small: Small, split: SplitLlamaForCausalLM) -> None:
    """``model(ids)`` with or without padding and cache: every position but padding is within 1e-4."""
    batches: list[dict[str, torch.Tensor]] = [padded_prompts(), {"input_ids": prompt(17, batch=2)}]
    for inputs, use_cache in itertools.product(batches, (True, False)):
        with torch.inference_mode():
            expected = small.unsplit(**inputs, use_cache=use_cache)
            output = split(**inputs, use_cache=use_cache)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(output.logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)
        assert (output.past_key_values is None) is (expected.past_key_values is None)


def test_the_loss_is_that_of_the_unsplit_model(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``labels`` give the same loss, positions marked -100 left out."""
    ids = prompt(17, batch=2)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.inference_mode():
        expected, output = (model(ids, labels=labels) for model in (plain.unsplit, lasting_split))
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 9])])
def test_only_the_logits_asked_for_cross(plain: Small, lasting_split: SplitLlamaForCausalLM, keep: Any) -> None:
    """``logits_to_keep`` selects positions, by number from the end or by index."""
    with torch.inference_mode():
        expected, output = (model(prompt(12), logits_to_keep=keep) for model in (plain.unsplit, lasting_split))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_ids_and_positions_may_be_of_32_bits(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """The unsplit model takes them too."""
    ids, positions = prompt(9).int(), torch.arange(9, dtype=torch.int32).unsqueeze(0)
    with torch.inference_mode():
        expected, output = (model(ids, position_ids=positions) for model in (plain.unsplit, lasting_split))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_embeddings_may_be_passed_for_ids(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``inputs_embeds`` replaces the lookup."""
    with torch.inference_mode():
        embedded = plain.unsplit.model.embed_tokens(prompt(9))
        expected, output = (model(inputs_embeds=embedded) for model in (plain.unsplit, lasting_split))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_a_cache_of_a_direct_call_may_be_continued_and_edited(
    plain: Small, lasting_split: SplitLlamaForCausalLM
) -> None:
    """Reordered, repeated, cropped and selected, a cache gives the logits that a dynamic one gives."""

    def run(model: LlamaForCausalLM, cache: Any) -> Iterator[torch.Tensor]:
        cache = model(prompt(9, batch=3), **{CACHE_NAME: cache}, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        yield model(prompt(4, batch=3, seed=2), **{CACHE_NAME: cache}).logits
        cache.crop(-3)
        yield model(prompt(1, batch=3, seed=3), **{CACHE_NAME: cache}).logits
        cache.batch_repeat_interleave(2)
        cache.crop(-1)
        yield model(prompt(2, batch=6, seed=4), **{CACHE_NAME: cache}).logits
        cache.batch_select_indices(torch.tensor([5, 1]))
        cache.reorder_cache(torch.tensor([1, 0]))
        yield model(prompt(2, batch=2, seed=5), **{CACHE_NAME: cache}).logits

    with torch.inference_mode():
        for found, expected in zip(run(lasting_split, None), run(plain.unsplit, DynamicCache()), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_reset_cache_takes_another_batch(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """After ``reset`` a cache is as new, whatever was asked of it before."""
    cache = lasting_split.new_cache()
    with torch.inference_mode():
        lasting_split(prompt(9, batch=3), past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.reset()
        output = lasting_split(prompt(5), past_key_values=cache)
        expected = plain.unsplit(prompt(5))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_copies_of_a_prompts_cache_go_on_alone(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """Two continuations of one copied cache, in turn, never see each other's tokens: transformers' prefix reuse."""
    prefix = prompt(9)
    with torch.inference_mode():
        cache = lasting_split(prefix, use_cache=True).past_key_values
        caches = [copy.deepcopy(cache) for _ in range(2)]
        texts = [prefix, prefix]
        for seed in (20, 30):
            for row in range(2):
                ids = prompt(3, seed=seed + row)
                texts[row] = torch.cat([texts[row], ids], dim=1)
                output = lasting_split(ids, past_key_values=caches[row])
                expected = plain.unsplit(texts[row], logits_to_keep=3)
                torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False], ids=["filled-in-inference-mode", "used-in-inference-mode"])
def test_what_comes_out_in_one_mode_may_be_used_in_the_other(
    plain: Small, lasting_split: SplitLlamaForCausalLM, first: bool
) -> None:
    """A generation goes on outside of ``torch.inference_mode()`` with the cache of one inside, and the other way round.

    Logits and hidden states are what they are unsplit: outside of that mode they may be written.
    """
    options: dict[str, Any] = {**SHARED, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode(mode=first):
        output = lasting_split.generate(**single_prompt(), **options, past_key_values=lasting_split.new_cache())
    cache = output.past_key_values
    copied = copy.deepcopy(cache)
    ids = torch.cat([output.sequences, prompt(3)], dim=1)
    with torch.inference_mode(mode=not first):
        expected = plain.unsplit.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for each in (cache, copied):
            more = lasting_split.generate(ids, attention_mask=torch.ones_like(ids), **options, past_key_values=each)
            assert torch.equal(more.sequences, expected.sequences)
            each.crop(-4)
            each.batch_repeat_interleave(2)
            lasting_split(prompt(2, batch=2), past_key_values=each)
    each.reorder_cache(torch.tensor([1, 0]))
    hidden = lasting_split.mode is not Mode.STACK
    shown = lasting_split(prompt(2, batch=2), past_key_values=each, output_hidden_states=hidden)
    for tensor in (shown.logits, *(shown.hidden_states or ())):
        tensor.add_(1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # A rounding is half of 2^-8 or 2^-11 of a value. A few dozen follow one another in three layers, in another order
    # in a stacked product than in three: allow eight units in the last place of the largest logit.
    [pytest.param(torch.bfloat16, 8 * 2**-8, id="bfloat16"), pytest.param(torch.float16, 8 * 2**-11, id="float16")],
)
def test_half_precision_logits_are_near_those_of_the_unsplit_model(
    plain: Small, mode: str, dtype: torch.dtype, tolerance: float
) -> None:
    """In the same dtype on both sides, logits differ by roundings only, and are of this dtype.

    Attention in two products rounds its scores, as transformers' eager attention does and its usual one doesn't.
    """
    attention = "eager" if mode == "op" else "sdpa"
    unsplit = LlamaForCausalLM.from_pretrained(plain.path, dtype=dtype, attn_implementation=attention)
    with (
        worker_in_thread(plain.path, dtype) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode, dtype=dtype) as split,
        torch.inference_mode(),
    ):
        expected, output = (model(prompt(17, batch=2)).logits for model in (unsplit, split))
        assert output.dtype == dtype
        error = (output.float() - expected.float()).abs().max()
        assert error <= tolerance * expected.float().abs().max()
        assert split.generate(**single_prompt(), **SHARED, do_sample=False).shape == (1, 11 + 16)


@pytest.mark.parametrize("mode", ["op", "fused", "layer"])
def test_hidden_states_are_those_of_the_unsplit_model(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Embeddings, each layer's, and the last after the final norm, in every split where they cross; with parts too."""
    ids = prompt(50, batch=2)
    for arena_bytes in (None, 64 << 10):  # the smaller one cuts the forward
        with (
            SplitLlamaForCausalLM.from_pretrained(
                plain.path, worker=plain_worker.address, mode=mode, arena_bytes=arena_bytes
            ) as split,
            torch.inference_mode(),
        ):
            found, expected = (model(ids, output_hidden_states=True).hidden_states for model in (split, plain.unsplit))
            assert len(found) == len(expected) == 4
            for mine, right in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["op", "fused"])
def test_attention_weights_are_those_of_the_unsplit_model(plain: Small, plain_split: SplitLlamaForCausalLM) -> None:
    """Where the trusted side attends, it returns weights as transformers' eager attention does."""
    unsplit = LlamaForCausalLM.from_pretrained(plain.path, attn_implementation="eager")
    with torch.inference_mode():
        outputs = [model(**padded_prompts(), output_attentions=True) for model in (plain_split, unsplit)]
    assert len(outputs[0].attentions) == len(outputs[1].attentions) == 3
    real = padded_prompts()["attention_mask"].bool()
    for mine, right in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine.transpose(1, 2)[real], right.transpose(1, 2)[real], atol=1e-5, rtol=1e-4)


def test_generation_gives_hidden_states(plain: Small, plain_worker: Worker) -> None:
    """``generate(output_hidden_states=True)`` has a tuple of them for each token."""
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, **options)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as split:
        output = split.generate(**single_prompt(), **SHARED, **options)
    assert len(output.hidden_states) == 16
    torch.testing.assert_close(output.hidden_states[5][2], expected.hidden_states[5][2], atol=1e-4, rtol=1e-4)


def test_a_tuple_is_returned_if_asked_for(plain: Small, lasting_split: SplitLlamaForCausalLM) -> None:
    """``return_dict=False`` gives the logits first in a tuple, as transformers does."""
    with torch.inference_mode():
        expected, output = (model(prompt(), return_dict=False) for model in (plain.unsplit, lasting_split))
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected[0], atol=1e-4, rtol=1e-4)
