"""The worker's KV sessions: who owns them, and when they are freed."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import TextStreamer

from llama_split import SplitLlamaForCausalLM
from tests.support.llamas import Small, Worker
from tests.support.prompts import SHARED, Spelled, padded_prompts, prompt, single_prompt


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_a_session_is_freed_when_generation_ends(
    plain_worker: Worker, layer_split: SplitLlamaForCausalLM, options: dict[str, Any]
) -> None:
    """When the cache's last reference goes, the worker frees it too."""
    layer_split.generate(**single_prompt(), pad_token_id=0, max_new_tokens=6, do_sample=False, **options)
    assert plain_worker.sessions_become(0)


class Broken(TextStreamer):  # type: ignore[misc]
    """A streamer that fails at the first token."""

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:
            raise OSError("the reader is gone")


def test_a_session_is_freed_when_generation_fails(
    plain: Small, plain_worker: Worker, layer_split: SplitLlamaForCausalLM
) -> None:
    """A generation that raises leaves no KV on the worker once its exception is dealt with, and the next one works."""
    with pytest.raises(OSError, match="the reader is gone"):
        layer_split.generate(**single_prompt(), **SHARED, do_sample=False, streamer=Broken(Spelled()))
    gc.collect()
    expected = plain.unsplit.generate(**single_prompt(), **SHARED, do_sample=False)
    assert torch.equal(layer_split.generate(**single_prompt(), **SHARED, do_sample=False), expected)
    assert plain_worker.sessions_become(0)


def test_a_session_lives_as_long_as_its_cache(plain_worker: Worker, layer_split: SplitLlamaForCausalLM) -> None:
    """A cache that is held keeps its session; when it dies, the next call frees it."""
    kept = layer_split(prompt(), use_cache=True).past_key_values
    other = layer_split(prompt(), use_cache=True).past_key_values
    assert plain_worker.sessions_become(2)
    del other
    layer_split(prompt(1), past_key_values=kept)
    assert plain_worker.sessions_become(1)
    del kept
    layer_split.generate(**single_prompt(), pad_token_id=0, max_new_tokens=1, do_sample=False)
    assert plain_worker.sessions_become(0)


def test_sessions_are_freed_when_the_client_closes(plain: Small, plain_worker: Worker) -> None:
    """A closed connection keeps nothing on the worker, even while its caches are still held here."""
    assert plain_worker.sessions_become(0)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode="layer") as split:
        caches = [split(prompt(), use_cache=True).past_key_values for _ in range(3)]
        assert plain_worker.sessions_become(3)
    assert plain_worker.sessions_become(0)
    del caches


def test_two_clients_in_turn_get_their_own_tokens(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Forwards of two models on one worker alternate, token by token; each continues its own text."""
    prompts = [prompt(9, seed=40), prompt(14, seed=41)]
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    expected = [plain.unsplit.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in prompts]
    address = plain_worker.address
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address, mode=mode) as first,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=address, mode=mode) as second,
        torch.inference_mode(),
    ):
        models, texts, caches = (first, second), list(prompts), [first.new_cache(), second.new_cache()]
        for _ in range(12):
            for index, model in enumerate(models):
                new = texts[index][:, caches[index].get_seq_length() :]
                token = model(new, past_key_values=caches[index]).logits[:, -1].argmax(-1, keepdim=True)
                texts[index] = torch.cat([texts[index], token], dim=1)
        for text, right in zip(texts, expected, strict=True):
            assert torch.equal(text, right)


def test_two_clients_at_once_get_their_own_tokens(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Two threads generate on one worker at the same time, one greedily and one with beams."""
    jobs: list[dict[str, Any]] = [{**single_prompt(), **SHARED}, {**padded_prompts(), **SHARED, "num_beams": 2}]
    expected = [plain.unsplit.generate(**job, do_sample=False) for job in jobs]

    def generate(job: dict[str, Any]) -> torch.Tensor:
        with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as split:
            tokens: torch.Tensor = split.generate(**job, do_sample=False)
            return tokens

    with ThreadPoolExecutor(2) as threads:
        for tokens, right in zip(threads.map(generate, jobs), expected, strict=True):
            assert torch.equal(tokens, right)
