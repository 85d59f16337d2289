"""One answer as it comes: its tokens as text, and why it ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .engine import Engine
from .sampling import Sampling, TokenProbability
from .text import AnswerText

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Order:
    """One answer that is asked for."""

    prompt: list[int]
    most_tokens: int
    stops: Sequence[str]
    sampling: Sampling


@dataclass(frozen=True)
class Part:
    """A piece of an answer: text, its tokens with their probabilities, and in the last one why the answer ends."""

    text: str
    tokens: int = 0
    probabilities: tuple[TokenProbability, ...] = ()
    reason: Reason | None = None


@dataclass
class Answer:
    """A whole answer; ``probabilities`` is None unless they were asked for."""

    text: str = ""
    tokens: int = 0
    probabilities: list[TokenProbability] | None = None
    reason: Reason = "stop"

    def add(self, part: Part) -> None:
        """Take the next part."""
        self.text += part.text
        self.tokens += part.tokens
        if self.probabilities is not None:
            self.probabilities += part.probabilities
        self.reason = part.reason or self.reason


@dataclass
class Answering:
    """Makes answers with one model.

    ``ends`` are the tokens that end an answer.
    """

    engine: Engine
    tokenizer: Any
    ends: list[int] = field(default_factory=list)

    async def parts(self, order: Order) -> AsyncGenerator[Part, None]:
        """The parts of an answer, each as soon as its text is certain. Raises as ``Engine.generate``."""
        text = AnswerText(self.tokenizer, order.stops)
        reason: Reason = "length"
        probabilities: list[TokenProbability] = []
        tokens = 0
        generated = self.engine.generate(order.prompt, order.most_tokens, self.ends, order.sampling)
        async with contextlib.aclosing(generated):
            async for new in generated:
                tokens += 1
                if new.token in self.ends:
                    reason = "stop"
                    continue
                certain = text.add(new.token)
                if new.probability is not None:
                    probabilities.append(new.probability)
                if certain or text.stopped:
                    yield Part(certain, tokens, tuple(probabilities))
                    probabilities, tokens = [], 0
                if text.stopped:
                    break
        rest = text.finish()
        if text.stopped:
            reason = "stop"
        yield Part(rest, tokens, tuple(probabilities), reason)
