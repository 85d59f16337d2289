"""Answers in OpenAI's form, whole and in parts, by the types of its own client library."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from .answers import Answer, Part
from .sampling import TokenProbability


def usage(prompt_tokens: int, answer_tokens: int) -> CompletionUsage:
    """How many tokens a request has taken."""
    return CompletionUsage(
        prompt_tokens=prompt_tokens, completion_tokens=answer_tokens, total_tokens=prompt_tokens + answer_tokens
    )


class Reply:
    """What all messages of one reply have in common.

    Args:
        model: the model's name.
        tokenizer: the model's, for the text of single tokens.
    """

    prefix = ""

    def __init__(self, model: str, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _text_of(self, token: int) -> str:
        text: str = self.tokenizer.decode([token])
        return text

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The whole reply."""
        raise NotImplementedError

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with for each answer; None: nothing."""
        raise NotImplementedError

    def part(self, index: int, part: Part) -> dict[str, Any]:
        """A part of an answer."""
        raise NotImplementedError

    def total(self, used: CompletionUsage) -> dict[str, Any]:
        """A stream's last message where its usage is asked for: no answers, but how many tokens were taken."""
        raise NotImplementedError


class ChatReply(Reply):
    """A reply to a chat."""

    prefix = "chatcmpl"

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        choices = [
            Choice(
                index=index,
                finish_reason=answer.reason,
                logprobs=self._whole_logprobs(answer),
                message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
            )
            for index, answer in enumerate(answers)
        ]
        completion = ChatCompletion(
            id=self.id,
            choices=choices,
            created=self.created,
            model=self.model,
            object="chat.completion",
            usage=usage(prompt_tokens, sum(answer.tokens for answer in answers)),
        )
        return completion.model_dump(mode="json", exclude_unset=True)

    def first(self, index: int) -> dict[str, Any]:
        return self._chunk(index, ChoiceDelta(role="assistant", content=""), None, None)

    def part(self, index: int, part: Part) -> dict[str, Any]:
        found = [self._logprob(one) for one in part.probabilities]
        logprobs = ChunkLogprobs(content=found, refusal=None) if found else None
        delta = ChoiceDelta(content=part.text) if part.text or part.reason is None else ChoiceDelta()
        return self._chunk(index, delta, part.reason, logprobs)

    def total(self, used: CompletionUsage) -> dict[str, Any]:
        return self._dump([], used)

    def _whole_logprobs(self, answer: Answer) -> ChoiceLogprobs | None:
        if answer.probabilities is None:
            return None
        return ChoiceLogprobs(content=[self._logprob(one) for one in answer.probabilities], refusal=None)

    def _chunk(self, index: int, delta: ChoiceDelta, reason: Any, logprobs: ChunkLogprobs | None) -> dict[str, Any]:
        return self._dump([ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)], None)

    def _dump(self, choices: list[ChunkChoice], used: CompletionUsage | None) -> dict[str, Any]:
        chunk = ChatCompletionChunk(
            id=self.id, choices=choices, created=self.created, model=self.model, object="chat.completion.chunk"
        )
        if used is not None:
            chunk.usage = used
        return chunk.model_dump(mode="json", exclude_unset=True)

    def _logprob(self, one: TokenProbability) -> ChatCompletionTokenLogprob:
        def described(token: int, logprob: float) -> dict[str, Any]:
            text = self._text_of(token)
            return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

        top = [TopLogprob(**described(token, logprob)) for token, logprob in one.top]
        return ChatCompletionTokenLogprob(**described(one.token, one.logprob), top_logprobs=top)


class TextReply(Reply):
    """A reply to a plain text."""

    prefix = "cmpl"

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        choices = [
            CompletionChoice(
                index=index,
                finish_reason=answer.reason,
                text=answer.text,
                logprobs=None if answer.probabilities is None else self._logprobs(answer.probabilities),
            )
            for index, answer in enumerate(answers)
        ]
        return self._dump(choices, usage(prompt_tokens, sum(answer.tokens for answer in answers)))

    def first(self, index: int) -> None:
        return None

    def part(self, index: int, part: Part) -> dict[str, Any]:
        logprobs = self._logprobs(part.probabilities) if part.probabilities else None
        choice = CompletionChoice.model_construct(
            index=index, finish_reason=part.reason, text=part.text, logprobs=logprobs
        )
        return self._dump([choice], None)

    def total(self, used: CompletionUsage) -> dict[str, Any]:
        return self._dump([], used)

    def _dump(self, choices: list[CompletionChoice], used: CompletionUsage | None) -> dict[str, Any]:
        completion = Completion.model_construct(
            id=self.id, choices=choices, created=self.created, model=self.model, object="text_completion"
        )
        if used is not None:
            completion.usage = used
        return completion.model_dump(mode="json", exclude_unset=True, warnings=False)

    def _logprobs(self, found: Sequence[TokenProbability]) -> Logprobs:
        return Logprobs(
            tokens=[self._text_of(one.token) for one in found],
            token_logprobs=[one.logprob for one in found],
            top_logprobs=[{self._text_of(token): logprob for token, logprob in one.top} for one in found],
        )
