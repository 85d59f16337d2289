"""How the next token of each request is chosen, whatever requests it is batched with.

transformers' scheduler takes one way of choosing for all requests. So it is told to choose greedily, and a logits
processor, which it calls with the scores of all requests, chooses for each by that request's own settings and leaves
only the chosen token possible.

Shape suffixes: R rows, one for each request that gets a token in this step, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from .forms import Form

KEYWORD = "choice"
"""The keyword by which a request brings its ``Choice`` along."""


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens.

    ``temperature`` of 0 means the likeliest token. ``top_logprobs`` is how many alternatives are to be recorded for
    each token; None records nothing, not even the token's own probability. ``form`` is what the whole answer must be.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    form: Form | None = None

    def for_answer(self, number: int) -> Sampling:
        """That of one of several answers to a request: each has a seed of its own, the first the given one."""
        if self.seed is None or number == 0:
            return self
        seed = random.Random(f"{self.seed} {number}").getrandbits(63)  # noqa: S311 - not for secrets
        return replace(self, seed=seed)


@dataclass(frozen=True)
class TokenProbability:
    """A token, the logarithm of its probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Choice:
    """Chooses the tokens of one request, and records their probabilities if they are wanted."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._seen: Counter[int] = Counter()
        self._grammar = None if sampling.form is None else sampling.form.begin()
        self.probabilities: list[TokenProbability] = []

    def choose(self, scores_V: torch.Tensor) -> int:
        """The next token.

        Args:
            scores_V: the model's logits, in float32; they are not changed.
        """
        sampling = self._sampling
        adjusted_V = self._adjusted(scores_V)
        if self._grammar is not None:
            adjusted_V = self._grammar.hide(adjusted_V)
        if sampling.temperature == 0.0:
            token = int(adjusted_V.argmax())
        else:
            probabilities_V = torch.softmax(adjusted_V / sampling.temperature, -1)
            token = int(torch.multinomial(_nucleus(probabilities_V, sampling.top_p), 1, generator=self._generator))
        self._seen[token] += 1
        if self._grammar is not None:
            self._grammar.take(token)
        if sampling.top_logprobs is not None:
            self._record(scores_V, token, sampling.top_logprobs)
        return token

    def _adjusted(self, scores_V: torch.Tensor) -> torch.Tensor:
        """The scores with this request's penalties and biases."""
        sampling = self._sampling
        changes = dict(sampling.logit_bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in self._seen.items():
                penalty = sampling.presence_penalty + sampling.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return scores_V
        tokens = torch.tensor(list(changes))
        return scores_V.index_add(0, tokens, torch.tensor(list(changes.values()), dtype=scores_V.dtype))

    def _record(self, scores_V: torch.Tensor, token: int, count: int) -> None:
        logprobs_V = torch.log_softmax(scores_V, -1)
        best = torch.topk(logprobs_V, count)
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self.probabilities.append(TokenProbability(token, float(logprobs_V[token]), top))


def _nucleus(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Only the likeliest tokens whose probabilities come to ``top_p``: nucleus sampling (Holtzman et al. 2020)."""
    if top_p >= 1.0:
        return probabilities_V
    ordered = torch.sort(probabilities_V, descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    kept = torch.where(before < top_p, ordered.values, 0.0)
    kept[0] = ordered.values[0]  # also where top_p is 0
    return torch.zeros_like(probabilities_V).scatter_(0, ordered.indices, kept)


class Choices(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Has each request's ``Choice`` choose, in transformers' scheduler."""

    supported_kwargs: ClassVar[dict[str, type]] = {KEYWORD: Choice}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._in_turn: list[Choice] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self._in_turn = [request.state.logit_processor_kwargs[KEYWORD] for request in requests_with_new_token]
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        chosen_RV = torch.full_like(scores, -math.inf)
        for row, choice in enumerate(self._in_turn):
            chosen_RV[row, choice.choose(scores[row])] = 0.0
        return chosen_RV


def choosing_by_request(processors: Any) -> None:
    """Make a scheduler's list of logits processors choose by ``Choices`` alone.

    Args:
        processors: transformers' ``ContinuousBatchingLogitsProcessorList``.
    """
    processors.logits_processor = LogitsProcessorList([Choices()])
    processors.tensors_required = 1
    processors.supported_keys = dict(Choices.supported_kwargs)
    processors.ignored_keys = set()
    processors.do_processing = True
