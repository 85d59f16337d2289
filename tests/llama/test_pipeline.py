"""A prompt in several parts that are in flight together: the same results, more calls, both sides at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.choices import MOST_PIPELINED
from llama_split.boundary.operations import OUT_PROJ, Mode
from llama_split.errors import LlamaSplitError
from llama_split.model.program import Program, WorkerOp
from llama_split.trusted.pipeline import FEWEST_TOKENS, execute_in_turn, split_prompt
from tests.support.llamas import Small, Worker, worker_in_thread
from tests.support.prompts import SHARED, prompt
from tests.support.workers import Workers, killing

_TRUSTED_MODES = [Mode.OP, Mode.FUSED]
_LONG = 5 * FEWEST_TOKENS + 3


@pytest.fixture(scope="module")
def worker(plain: Small) -> Iterator[Worker]:
    """A worker of the small model for all tests of this module."""
    with worker_in_thread(plain.path) as running:
        yield running


@pytest.fixture(params=_TRUSTED_MODES)
def pipelined(plain: Small, worker: Worker, request: pytest.FixtureRequest) -> Iterator[SplitLlamaForCausalLM]:
    """The split model in each mode that can, with three parts."""
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=worker.address, mode=request.param, pipeline=3
    ) as split:
        yield split


def padded() -> dict[str, torch.Tensor]:
    """Two prompts; the first one starts with padding."""
    mask = torch.ones(2, _LONG, dtype=torch.int64)
    mask[0, : FEWEST_TOKENS + 5] = 0
    return {"input_ids": prompt(_LONG, batch=2) * mask, "attention_mask": mask}


def test_tokens_are_those_of_the_unsplit_model(plain: Small, pipelined: SplitLlamaForCausalLM) -> None:
    """Greedy tokens after a padded batch of prompts, whose padding ends within a part."""
    expected = plain.unsplit.generate(**padded(), **SHARED, do_sample=False)
    assert torch.equal(pipelined.generate(**padded(), **SHARED, do_sample=False), expected)


@torch.inference_mode()
def test_logits_are_those_of_the_unsplit_model(plain: Small, pipelined: SplitLlamaForCausalLM) -> None:
    """All positions' logits, of a first prompt and of a second one over the first one's cache."""
    first, second = prompt(_LONG), prompt(_LONG, seed=9)
    output = pipelined(first, use_cache=True)
    more = pipelined(second, past_key_values=output.past_key_values)
    expected = plain.unsplit(torch.cat([first, second], dim=1)).logits
    torch.testing.assert_close(torch.cat([output.logits, more.logits], dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_parts_are_under_way_together(plain: Small, worker: Worker, pipelined: SplitLlamaForCausalLM) -> None:
    """One call in flight per part; each part makes its own calls, and linear layers' tensors still cross only once."""
    ids = prompt(_LONG)
    with SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=pipelined.mode) as whole:
        outside = 1 + (pipelined.mode is Mode.OP)  # lm_head, and in op the embedding, see the whole prompt
        for split in (pipelined, whole):
            split.workers[0].client.call("describe")
        before = pipelined.statistics(), whole.statistics()
        pipelined(ids)
        whole(ids)
        calls = [split.statistics().calls - one.calls for split, one in zip((pipelined, whole), before, strict=True)]
        assert calls[0] - outside == 3 * (calls[1] - outside)
        assert pipelined.statistics().in_flight_peak == 3
        assert whole.statistics().in_flight_peak == 1
        if pipelined.mode is Mode.FUSED:
            sent = [split.statistics().tensor_bytes_sent for split in (pipelined, whole)]
            assert sent[0] == sent[1]


@torch.inference_mode()
def test_what_can_not_be_cut_goes_through_whole(plain: Small, pipelined: SplitLlamaForCausalLM) -> None:
    """Short prompts, forwards without a cache, and forwards that must return more than logits."""
    for options in (
        {"input_ids": prompt(2 * FEWEST_TOKENS - 1)},
        {"input_ids": prompt(_LONG), "use_cache": False},
        {"input_ids": prompt(_LONG), "output_hidden_states": True},
    ):
        output = pipelined(**options)
        expected = plain.unsplit(**options)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
        for mine, theirs in zip(output.hidden_states or (), expected.hidden_states or (), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert pipelined.statistics().in_flight_peak == 1


@torch.inference_mode()
def test_parts_that_the_arenas_have_no_room_for_wait_for_each_other(plain: Small, worker: Worker) -> None:
    """With an arena too small for all parts' tensors, the results are the same."""
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=worker.address, mode="op", pipeline=4, arena_bytes=40_000
    ) as split:
        ids = prompt(_LONG)
        torch.testing.assert_close(split(ids).logits, plain.unsplit(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("mode", "channel"), [(Mode.OP, "zmq"), (Mode.FUSED, "doorbell")])
@torch.inference_mode()
def test_a_worker_killed_with_parts_under_way_costs_no_token(
    plain: Small,
    workers: Workers,
    mode: Mode,
    channel: Any,
) -> None:
    """Killed -9 again and again before a part's call, with others in flight: the same logits, one epoch per kill."""
    ids = prompt(_LONG)
    expected = plain.unsplit(ids).logits
    workers.start()
    with SplitLlamaForCausalLM.from_pretrained(
        plain.path, worker=workers.address, mode=mode, channel=channel, revive=workers.start, pipeline=3
    ) as split:
        kills = killing(split, workers.kill, every=10)
        torch.testing.assert_close(split(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert kills
        assert split.workers[0].epoch == len(kills)
        workers.kill()


@pytest.mark.parametrize("mode", [Mode.LAYER, Mode.STACK])
def test_where_the_worker_attends_there_is_nothing_to_overlap(plain: Small, worker: Worker, mode: Mode) -> None:
    """More than one part is refused; the error lists the modes that allow it."""
    with pytest.raises(LlamaSplitError, match="use fused or op"):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, mode=mode, pipeline=2)


@pytest.mark.parametrize("parts", [0, -1, MOST_PIPELINED + 1])
def test_a_senseless_number_of_parts_is_refused(plain: Small, worker: Worker, parts: int) -> None:
    """The error names the limit."""
    with pytest.raises(LlamaSplitError, match=f"choose 1 to {MOST_PIPELINED}"):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address, pipeline=parts)


@pytest.mark.parametrize("tokens", [0, 1, FEWEST_TOKENS, 2 * FEWEST_TOKENS, _LONG, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, MOST_PIPELINED])
def test_parts_cover_a_prompt_in_order(tokens: int, parts: int) -> None:
    """Every token is in one part; none is shorter than worthwhile unless it is the only one; none is much longer."""
    found = split_prompt(tokens, parts)
    assert [token for part in found for token in range(part.start, part.stop)] == list(range(tokens))
    assert len(found) == max(min(parts, tokens // FEWEST_TOKENS), 1)
    lengths = [part.stop - part.start for part in found]
    assert max(lengths) - min(lengths) <= 1
    assert len(found) == 1 or min(lengths) >= FEWEST_TOKENS


def test_parts_take_turns_in_their_order() -> None:
    """Each part's n-th step is begun, and its result used, before the next part's n-th."""
    events: list[tuple[str, int, float]] = []

    def forward(part: int) -> Program:
        for number in range(3):
            result = yield WorkerOp(OUT_PROJ, number, (torch.tensor(10 * part + number),))
            events.append(("used", part, result.item()))
        return torch.tensor(part)

    def begin(op: WorkerOp) -> Callable[[], torch.Tensor]:
        (argument,) = op.arguments
        events.append(("begun", int(argument) // 10, argument.item()))
        return lambda: argument

    results = execute_in_turn([forward(0), forward(1)], begin, lambda _op: "the worker", 2)
    assert [int(result) for result in results] == [0, 1]
    for kind in ("begun", "used"):
        assert [(part, value) for one, part, value in events if one == kind] == [
            (part, 10 * part + number) for number in range(3) for part in range(2)
        ]
    assert events[:3] == [("begun", 0, 0), ("begun", 1, 10), ("used", 0, 0)]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_part_starts_when_there_is_room_and_all_places_get_busy(at_once: int) -> None:
    """Never more parts at a place than allowed, in their order; the last place works while the first still does."""
    events: list[tuple[int, int]] = []
    present: Counter[int] = Counter()

    def forward(part: int) -> Program:
        for number in range(6):  # two operations at each of three places
            yield WorkerOp(OUT_PROJ, number, (torch.tensor(part),))
            present[number // 2] -= number % 2
        return torch.tensor(part)

    def begin(op: WorkerOp) -> Callable[[], torch.Tensor]:
        part, where = int(op.arguments[0]), op.layer // 2
        present[where] += op.layer % 2 == 0
        assert present[where] <= at_once
        events.append((part, op.layer))
        return lambda: torch.tensor(0)

    parts = 12
    results = execute_in_turn([forward(part) for part in range(parts)], begin, lambda op: op.layer // 2, at_once)
    assert [int(result) for result in results] == list(range(parts))
    for layer in range(6):
        assert [part for part, one in events if one == layer] == list(range(parts))
    assert events.index((0, 5)) < events.index((parts - 1, 0))
