"""Continuous batching by transformers' own scheduler: each request gets the tokens that it gets alone."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from llama_split import SplitLlamaForCausalLM, UnsupportedBySplit
from llama_split.boundary.geometry import Geometry
from llama_split.boundary.operations import Mode
from llama_split.boundary.traffic import calls_per_forward
from tests.support.helpers import eventually
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.prompts import SHARED, prompt, single_prompt
from tests.support.workers import Workers, killing

NEW_TOKENS = 10
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
PAGES = ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=32)  # long prompts come in pieces
LENGTHS = (5, 41, 1, 12, 3, 70)
BATCHING = ("op", "fused", "layer", "stack")


def prompts() -> list[list[int]]:
    return [prompt(length, seed=length)[0].tolist() for length in LENGTHS]


def alone(small: Small, ids: list[int], tokens: int = NEW_TOKENS) -> list[int]:
    """What the unsplit model answers to one prompt."""
    whole = small.unsplit.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    answer: list[int] = whole[0, len(ids) :].tolist()
    return answer


def batched(model: Any, inputs: list[list[int]]) -> list[list[int]]:
    """What a model answers to all prompts together, in their order."""
    found = model.generate_batch(inputs, generation_config=copy.copy(GREEDY), continuous_batching_config=PAGES)
    assert [one.error for one in found.values()] == [None] * len(inputs)
    by_prompt = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
    return [by_prompt[tuple(ids)] for ids in inputs]


@pytest.mark.parametrize("mode", BATCHING)
def test_each_request_gets_the_tokens_that_it_gets_alone(small: Small, worker: Worker, mode: str) -> None:
    """Short and long prompts together, one of them longer than a batch: as the unsplit model, alone and batched."""
    with SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, mode=mode) as split:
        found = batched(split, prompts())
        assert found == [alone(small, ids) for ids in prompts()]
        assert found == batched(small.unsplit, prompts())
        assert split.generate(**single_prompt(), **SHARED, do_sample=False).tolist() == (
            small.unsplit.generate(**single_prompt(), **SHARED, do_sample=False).tolist()
        ), "a generation after that is as before"


@pytest.mark.parametrize("mode", BATCHING)
def test_the_rows_of_all_requests_cross_together(plain: Small, plain_worker: Worker, mode: str) -> None:
    """A step of several requests makes as many calls as that of one, not as many for each."""
    geometry = Geometry.of(plain.unsplit.config)
    inputs = [prompt(3, seed=seed)[0].tolist() for seed in range(6)]
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as split:
        before = split.statistics().calls
        batched(split, inputs)
        steps = NEW_TOKENS + 1  # one more where the scheduler fills the first batch in two steps
        ends = len(inputs) if split.mode.worker_keeps_kv else 0
        assert split.statistics().calls - before <= steps * calls_per_forward(Mode(mode), geometry) + ends


def test_requests_come_and_go_at_any_step(plain: Small, plain_worker: Worker) -> None:
    """One is cancelled in the middle, others come later: none of the others is touched by that."""
    inputs = prompts()
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address) as split:
        manager = split.init_continuous_batching(generation_config=copy.copy(GREEDY), continuous_batching_config=PAGES)
        manager.start()
        try:
            endless = manager.add_request(inputs[0], max_new_tokens=400, streaming=True)
            first = manager.add_request(inputs[1], max_new_tokens=NEW_TOKENS)
            while (started := manager.get_result(timeout=10.0)) is None or started.request_id != endless:
                pass
            later = [manager.add_request(ids, max_new_tokens=NEW_TOKENS) for ids in inputs[2:]]
            manager.cancel_request(endless)
            answers = {}
            deadline = time.monotonic() + 60
            while len(answers) < 1 + len(later):
                assert time.monotonic() < deadline
                result = manager.get_result(timeout=1.0)
                if result is not None and result.request_id != endless and result.is_finished():
                    answers[result.request_id] = result.generated_tokens
        finally:
            manager.stop(block=True)
            manager.destroy()
    assert [answers[one] for one in (first, *later)] == [alone(plain, ids) for ids in inputs[1:]]


@pytest.mark.parametrize("mode", BATCHING)
def test_a_worker_killed_in_the_middle_costs_no_request_a_token(plain: Small, workers: Workers, mode: str) -> None:
    """Killed again and again, between any two operations, and started again."""
    workers.start()
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=workers.address, mode=mode, revive=workers.start
    ) as split:
        per_forward = calls_per_forward(Mode(mode), Geometry.of(plain.unsplit.config))
        replay = len(LENGTHS) if split.mode.worker_keeps_kv else 0  # forwards of each request's tokens so far
        kills = killing(split, workers.kill, ((1 if replay else 3) + replay) * per_forward + per_forward // 2 + 1)
        found = batched(split, prompts())
        assert len(kills) >= (2 if replay else 3)
        workers.kill()
    assert found == [alone(plain, ids) for ids in prompts()]


@pytest.mark.parametrize("mode", BATCHING)
def test_a_request_that_has_to_give_way_gets_its_tokens_later(plain: Small, plain_worker: Worker, mode: str) -> None:
    """Where memory is short the scheduler frees a request's KV, and begins it again with what it has generated."""
    inputs = [prompt(length, seed=length)[0].tolist() for length in (22, 23, 21, 24)]
    small = copy.copy(PAGES)
    small.num_blocks = 12  # of 8 tokens: room for all four prompts, and not for their answers
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as split:
        manager = split.init_continuous_batching(generation_config=copy.copy(GREEDY), continuous_batching_config=small)
        manager.start()
        restarted: list[bool] = []
        try:
            assert eventually(lambda: manager.batch_processor is not None)
            offloading = manager.batch_processor.offloading_manager
            offload = offloading.offload_requests

            def noted() -> bool:
                restarted.append(bool(offload()))
                return restarted[-1]

            offloading.offload_requests = noted
            names = [manager.add_request(ids, max_new_tokens=2 * NEW_TOKENS) for ids in inputs]
            answers: dict[str, list[int]] = {}
            deadline = time.monotonic() + 60
            while len(answers) < len(names):
                assert time.monotonic() < deadline
                result = manager.get_result(timeout=1.0)
                if result is not None and result.is_finished():
                    assert result.error is None
                    answers[result.request_id] = result.generated_tokens
        finally:
            manager.stop(block=True)
            manager.destroy()
    assert any(restarted)
    assert [answers[name] for name in names] == [alone(plain, ids, 2 * NEW_TOKENS) for ids in inputs]


def test_generate_uses_it_by_its_name_too(plain: Small, plain_worker: Worker) -> None:
    """``cache_implementation="paged"`` gives what it gives on the unsplit model: the tokens of any other cache."""
    paged = copy.copy(GREEDY)
    paged.cache_implementation = "paged"
    paged.continuous_batching_config = PAGES
    expected = plain.unsplit.generate(**single_prompt(), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address) as split:
        found = split.generate(**single_prompt(), generation_config=paged)
    assert found.flatten().tolist() == expected.flatten().tolist()


def test_an_eager_model_batches_and_stays_eager(plain: Small, plain_worker: Worker) -> None:
    """The scheduler chooses its own form of it, and puts the former one back."""
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address) as split:
        split.set_attn_implementation("eager")
        assert batched(split, prompts()) == [alone(plain, ids) for ids in prompts()]
        assert split.config._attn_implementation == "eager"


@pytest.mark.parametrize("mode", ["layer", "stack"])
@pytest.mark.parametrize("unsupported", ["cpu_offload_space", "num_return_sequences"])
def test_what_needs_the_kv_here_is_refused_where_the_worker_keeps_it(
    plain: Small, plain_worker: Worker, mode: str, unsupported: str
) -> None:
    """Before anything is begun, with the modes that have it."""
    config, generation = copy.copy(PAGES), copy.copy(GREEDY)
    setattr(config if hasattr(config, unsupported) else generation, unsupported, 2)
    with (
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=plain_worker.address, mode=mode) as split,
        pytest.raises(UnsupportedBySplit, match=f"{unsupported} .*in mode {mode}.*use mode fused or op"),
    ):
        split.generate_batch(prompts(), generation_config=generation, continuous_batching_config=config)


@pytest.mark.parametrize("mode", ["layer", "stack"])
def test_requests_that_failed_leave_no_session(plain: Small, mode: str) -> None:
    """A forward that fails ends the scheduler and all its requests; their sessions end too, and others can run."""
    with (
        worker_in_thread(plain.path) as worker,
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode) as split,
    ):
        client = split.workers[0].client
        submit, calls = client.submit, 0

        def failing(method: str, *arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += method == split.mode.value
            return submit(
                "no_such_method" if (method, calls) == (split.mode.value, 6) else method, *arguments, **keywords
            )

        client.submit = failing  # type: ignore[method-assign]
        found = split.generate_batch(
            prompts(), generation_config=copy.copy(GREEDY), continuous_batching_config=copy.copy(PAGES)
        )
        assert len(found) < len(LENGTHS) or any(one.error for one in found.values())
        assert batched(split, prompts()[:1]) == [alone(plain, prompts()[0])]
        assert worker.sessions_become(0)
