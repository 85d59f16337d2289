"""The choice of tokens: by each request's own settings, whatever it is batched with."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from llama_split.serving.sampling import KEYWORD, Choice, Choices, Sampling

SCORES = torch.tensor([1.0, 3.0, 2.0, 0.0])


def _drawn(sampling: Sampling, times: int = 4000) -> dict[int, float]:
    """How often each token is chosen, as a share."""
    choice = Choice(sampling)
    counts = Counter(choice.choose(SCORES) for _ in range(times))
    return {token: count / times for token, count in counts.items()}


def test_at_temperature_0_the_likeliest_is_chosen() -> None:
    """Every time, and the scores stay as they are."""
    before = SCORES.clone()
    assert _drawn(Sampling(temperature=0.0), 5) == {1: 1.0}
    assert torch.equal(before, SCORES)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature: float) -> None:
    """The softmax of the scores over the temperature."""
    expected = torch.softmax(SCORES / temperature, -1)
    found = _drawn(Sampling(temperature=temperature, seed=1))
    assert all(abs(found.get(token, 0.0) - float(expected[token])) < 0.04 for token in range(4))


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, {1}), (0.6, {1}), (0.8, {1, 2}), (0.999, {0, 1, 2, 3})])
def test_top_p_keeps_the_likeliest(top_p: float, kept: set[int]) -> None:
    """As few as come to that probability, at least one."""
    assert set(_drawn(Sampling(top_p=top_p, seed=1))) == kept


def test_a_seed_gives_the_same_tokens_again() -> None:
    """And another one, or none, others."""

    def tokens(seed: int | None) -> list[int]:
        choice = Choice(Sampling(temperature=2.0, seed=seed))
        return [choice.choose(SCORES) for _ in range(64)]

    assert tokens(7) == tokens(7)
    assert tokens(-7) == tokens(-7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_penalties_count_what_was_chosen() -> None:
    """A presence penalty once, a frequency penalty each time."""
    present = Choice(Sampling(temperature=0.0, presence_penalty=1.5))
    assert [present.choose(SCORES) for _ in range(4)] == [1, 2, 1, 1]  # 3, then 1.5 against 2, then 1.5 against 0.5
    frequent = Choice(Sampling(temperature=0.0, frequency_penalty=0.75))
    assert [frequent.choose(SCORES) for _ in range(4)] == [1, 1, 2, 1]  # 3, 2.25, then 1.5 against 2, then against 1.25


def test_a_bias_makes_a_token_sure_or_impossible() -> None:
    """Added to its score."""
    assert set(_drawn(Sampling(logit_bias={3: 100.0}), 50)) == {3}
    assert 1 not in _drawn(Sampling(logit_bias={1: -100.0}), 200)


def test_probabilities_are_the_models_own() -> None:
    """Not those after temperature and bias; as many alternatives as asked for, the likeliest first."""
    choice = Choice(Sampling(temperature=0.0, logit_bias={0: 100.0}, top_logprobs=2))
    assert choice.choose(SCORES) == 0
    (found,) = choice.probabilities
    expected = torch.log_softmax(SCORES, -1)
    assert found.token == 0
    assert found.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in found.top] == [1, 2]
    assert [logprob for _, logprob in found.top] == pytest.approx(expected[[1, 2]].tolist())


def test_each_row_is_chosen_by_its_own_request() -> None:
    """Only the chosen token of each stays possible, so that the scheduler's greedy choice takes it."""
    choices = [Choice(Sampling(temperature=0.0)), Choice(Sampling(temperature=0.0, logit_bias={2: 50.0}))]
    states = [SimpleNamespace(state=SimpleNamespace(logit_processor_kwargs={KEYWORD: choice})) for choice in choices]
    processor = Choices()
    processor.prepare_tensor_args(states)
    scores = processor(torch.stack([SCORES, SCORES]), torch.zeros(2, dtype=torch.int32))
    assert scores.argmax(-1).tolist() == [1, 2]
    assert scores.exp().sum(-1).tolist() == [1.0, 1.0]
    assert math.isinf(scores.min())
