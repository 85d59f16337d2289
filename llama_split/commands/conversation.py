"""A chat's state: its messages, and a KV cache that every turn goes on from.

Before a turn the chat is rendered anew by the model's template. What the cache has of the same tokens is kept, what it
has beyond that is cropped: a template may drop or change what was said, and an answer's text need not be encoded as
the tokens that it was generated as.
"""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass
from itertools import takewhile
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from .options import Sampling
from .prompts import Message, answer, decode, encode_chat

if TYPE_CHECKING:
    import torch
    from transformers import Cache

    from ..trusted.model import SplitLlamaForCausalLM
    from .opening import Opening


class Interruption:
    """Within the block Ctrl-C is noted, for whoever looks, instead of raised; a second one is raised."""

    def __init__(self) -> None:
        self.noted = False

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)

    def stops(self, ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        """A stopping criterion of transformers: a generation ends after the token that it is at."""
        return ids.new_full((ids.shape[0],), self.noted).bool()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True


@dataclass(frozen=True)
class Prompt:
    """A chat's messages up to a question, and the same as token ids [1, T]."""

    messages: list[Message]
    ids: torch.Tensor


@dataclass(frozen=True)
class Turn:
    """One answer: its text and tokens, how many tokens its prompt had, and how many of them were cached already."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    interrupted: bool

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON; what had to be put through the model before the answer as well."""
        return {**asdict(self), "prefilled_tokens": self.prompt_tokens - self.cached_tokens}


class Conversation:
    """A chat with one model; ``system`` is what the model is told before all else.

    Raises:
        LlamaSplitError: the model's chat template takes no such message.
    """

    def __init__(self, opening: Opening, limit: int, sampling: Sampling, system: str | None) -> None:
        self.tokenizer = opening.tokenizer
        self._opening = opening
        self._limit = limit
        self._sampling = sampling
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        encode_chat(self.tokenizer, [*self._first, {"role": "user", "content": "Hello"}])
        self.reset()

    def reset(self) -> None:
        """Forget all that was said."""
        self._messages = list(self._first)
        self._cache: Cache | None = None
        self._cached: list[int] = []

    def prompt(self, text: str) -> Prompt:
        """The chat with the user's next message, which is not said yet.

        Raises:
            LlamaSplitError: it is too long by now, or its template fails.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = encode_chat(self.tokenizer, messages)
        self._opening.check_prompt(ids)
        return Prompt(messages, ids)

    def ask(self, llama: SplitLlamaForCausalLM, prompt: Prompt, streamer: Any) -> Turn:
        """What ``llama`` answers. Ctrl-C ends the answer; what there is of it counts."""
        asked: list[int] = prompt.ids[0].tolist()
        cache, kept = self._cache_for(llama, asked)
        limit = min(self._limit, self._opening.positions - len(asked))
        with Interruption() as interruption:
            tokens = answer(
                *(llama, self.tokenizer, prompt.ids, limit, self._sampling),
                streamer=streamer,
                cache=cache,
                stopping_criteria=[interruption.stops],
            )
        self._cache, self._cached = cache, [*asked, *tokens][: cache.get_seq_length()]
        said = decode(self.tokenizer, tokens)
        self._messages = [*prompt.messages, {"role": "assistant", "content": said}]
        return Turn(said, tokens, len(asked), kept, interruption.noted)

    def _cache_for(self, llama: SplitLlamaForCausalLM, asked: list[int]) -> tuple[Cache, int]:
        """A cache that holds nothing but the beginning of a prompt, and how many tokens of it."""
        pairs = zip(self._cached, asked, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        kept = min(same, len(asked) - 1)  # the last one's logits are wanted
        if self._cache is None or kept == 0:
            return llama.new_cache(), 0
        self._cache.crop(kept - len(self._cached))
        self._cached = asked[:kept]
        return self._cache, kept
