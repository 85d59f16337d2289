"""What a split model refuses: workers of other models, and whatever can't cross."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from llama_split import SplitLlamaForCausalLM, UnsupportedBySplit, WorkerMismatch
from tests.support.llamas import Small, Worker
from tests.support.prompts import QUANTIZED, SHARED, prompt, single_prompt


def mismatch(small: Small, worker: Worker, **options: Any) -> str:
    """The one-line error for this model and worker."""
    with pytest.raises(WorkerMismatch) as caught:
        SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, **options).close()
    text = str(caught.value)
    assert "\n" not in text
    assert worker.address in text
    return text


def test_a_worker_of_another_geometry_is_refused(plain_worker: Worker, save_small: Callable[..., Small]) -> None:
    """The error shows both geometries."""
    text = mismatch(save_small(num_hidden_layers=2), plain_worker)
    assert "layers=3" in text
    assert "layers=2" in text
    assert "--model" in text


def test_a_worker_of_other_weights_is_refused(plain_worker: Worker, save_small: Callable[..., Small]) -> None:
    """The same shape with other weights would give nonsense."""
    assert "other weights" in mismatch(save_small(seed=9), plain_worker)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"hidden_act": "gelu"},
    ],
    ids=["norm-epsilon", "rope", "activation"],
)
def test_a_worker_of_the_same_weights_under_another_configuration_is_refused(
    plain_worker: Worker, save_small: Callable[..., Small], overrides: dict[str, Any]
) -> None:
    """Settings outside the weights that change the arithmetic, which in layer mode is the worker's, must agree too."""
    mismatch(save_small(seed=5, **overrides), plain_worker, mode="layer")


def test_a_worker_of_another_dtype_is_refused(plain: Small, plain_worker: Worker) -> None:
    """The error shows both dtypes."""
    text = mismatch(plain, plain_worker, dtype="bfloat16")
    assert "float32" in text
    assert "bfloat16" in text


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        pytest.param((), {"cache_implementation": "quantized", "max_new_tokens": 3}, id="by-name"),
        pytest.param((), {"cache_implementation": "offloaded_static", "max_new_tokens": 3}, id="elsewhere"),
        pytest.param((), {"generation_config": QUANTIZED}, id="in-a-configuration"),
        pytest.param((QUANTIZED,), {}, id="in-a-positional-configuration"),
    ],
)
def test_a_cache_that_the_worker_does_not_have_is_refused_by_its_name(
    layer_split: SplitLlamaForCausalLM, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """By whichever name transformers knows it: its numbers or its place would differ."""
    with pytest.raises(UnsupportedBySplit, match=r"quantized|offloaded_static"):
        layer_split.generate(prompt(), *arguments, **keywords)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_an_output_that_a_split_does_not_have_is_refused(
    plain_split: SplitLlamaForCausalLM, mode: str, asked: str
) -> None:
    """What never leaves the worker can't be given; the error names a split that can, in a call and in generation."""
    kept = {"output_hidden_states": ["stack"], "output_attentions": ["layer", "stack"]}[asked]
    if mode not in kept:
        assert plain_split(prompt(), **{asked: True})[asked.removeprefix("output_")] is not None
        return
    with pytest.raises(UnsupportedBySplit, match=f"{asked}.*mode {mode}.*use mode (layer|fused)"):
        plain_split(prompt(), **{asked: True})
    with pytest.raises(UnsupportedBySplit, match=asked):
        plain_split.generate(**single_prompt(), **SHARED, return_dict_in_generate=True, **{asked: True})


def test_training_is_refused(plain_split: SplitLlamaForCausalLM) -> None:
    """Training mode implies dropout and gradients, and neither crosses to the worker."""
    plain_split.train()
    with pytest.raises(UnsupportedBySplit, match="can't be trained"):
        plain_split(prompt())
    plain_split.eval()
    plain_split(prompt())


def test_gradients_are_refused(plain_split: SplitLlamaForCausalLM) -> None:
    """Inputs or parameters that require a gradient would get none; without gradients they are accepted."""
    embedded = torch.randn(1, 5, plain_split.config.hidden_size, requires_grad=True)
    with pytest.raises(UnsupportedBySplit, match="gradient"):
        plain_split(inputs_embeds=embedded)
    with torch.no_grad():
        plain_split(inputs_embeds=embedded)
    parameter = next(plain_split.parameters())
    parameter.requires_grad_()
    with pytest.raises(UnsupportedBySplit, match="gradient"):
        plain_split(prompt())


def test_a_cache_of_another_kind_is_refused_where_the_worker_keeps_the_kv(layer_split: SplitLlamaForCausalLM) -> None:
    """A local dynamic cache can't hold the worker's KV; the error gives the remedy."""
    with pytest.raises(UnsupportedBySplit, match="new_cache"):
        layer_split(prompt(), past_key_values=DynamicCache())
    with pytest.raises(UnsupportedBySplit, match="new_cache"):
        layer_split.generate(**single_prompt(), **SHARED, past_key_values=DynamicCache())


def test_a_cache_of_another_models_connection_is_refused(
    plain: Small, plain_worker: Worker, layer_split: SplitLlamaForCausalLM
) -> None:
    """A session belongs to the connection that made it: another's cache would continue another text."""
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as other,
        torch.inference_mode(),
    ):
        mine = layer_split(prompt(seed=1), use_cache=True).past_key_values
        theirs = other(prompt(seed=2), use_cache=True).past_key_values
        with pytest.raises(UnsupportedBySplit):
            layer_split(prompt(1), past_key_values=theirs)
        del mine


@pytest.mark.parametrize(
    "inputs",
    [{"attention_mask": torch.zeros(1, 1, 4, 4)}, {"position_ids": torch.arange(4)[None] / 2}],
    ids=["mask", "positions"],
)
def test_what_can_not_cross_is_refused_where_the_worker_attends(
    layer_split: SplitLlamaForCausalLM, inputs: dict[str, Any]
) -> None:
    """A mask other than padding, and positions between integers; the cache stays usable."""
    cache = layer_split(prompt(4), use_cache=True).past_key_values
    with pytest.raises(UnsupportedBySplit, match="use mode fused"):
        layer_split(prompt(4), **inputs)
    layer_split(prompt(1), past_key_values=cache)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_belongs_to_the_process_that_made_it(
    layer_split: SplitLlamaForCausalLM, make: Callable[..., Any]
) -> None:
    """A copy or a pickle would share one connection: a TypeError says to connect in the other process."""
    with pytest.raises(TypeError, match=r"a SplitLlamaForCausalLM can't be copied.*connect in that process"):
        make(layer_split)
