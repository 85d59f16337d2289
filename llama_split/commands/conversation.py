"""The state of a chat: its messages, and a KV cache that every turn continues.

Before each turn the model's template renders the whole chat again. The cache keeps the tokens that are still the same
and is cropped after them: a template may drop or change earlier messages, and the text of an answer may be encoded as
other tokens than those that were generated.
"""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any

from .options import Sampling
from .prompts import Message, answer, decode, encode_chat

if TYPE_CHECKING:
    import torch
    from transformers import Cache

    from ..trusted.model import SplitLlamaForCausalLM
    from .opening import Opening


class Interruption:
    """Within the block, the first Ctrl-C is only noted; the second one is raised."""

    def __init__(self) -> None:
        self.noted = False
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def stops(self, ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        """A stopping criterion for transformers: once Ctrl-C was noted, the current token is the last."""
        return ids.new_full((ids.shape[0],), self.noted).bool()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True


@dataclass(frozen=True)
class Prompt:
    """The messages of a chat up to a question, and their token ids [1, T]."""

    messages: list[Message]
    ids: torch.Tensor


@dataclass(frozen=True)
class Turn:
    """One answer: its text and tokens, the tokens of its prompt, and how many of those were already cached."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    interrupted: bool

    def facts(self) -> dict[str, Any]:
        """All fields for JSON, and the number of tokens that had to be prefilled before the answer."""
        return {**asdict(self), "prefilled_tokens": self.prompt_tokens - self.cached_tokens}


class Conversation:
    """A chat with one model.

    Args:
        opening: the model's files and limits.
        limit: the most tokens of an answer.
        sampling: how tokens are chosen.
        system: what the model is told before anything else.

    Raises:
        LlamaSplitError: the model's chat template can't render such messages.
    """

    def __init__(self, opening: Opening, limit: int, sampling: Sampling, system: str | None) -> None:
        self.tokenizer = opening.tokenizer
        self._opening = opening
        self._limit = limit
        self._sampling = sampling
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._first)
        self._cache: Cache | None = None
        self._cached: list[int] = []  # the tokens whose KV the cache holds
        encode_chat(self.tokenizer, [*self._first, {"role": "user", "content": "Hello"}])

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self._messages = list(self._first)
        self._cache = None
        self._cached = []

    def prompt(self, text: str) -> Prompt:
        """The chat with the user's next message, which is not part of it yet.

        Raises:
            LlamaSplitError: the chat has become too long, or its template fails.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = encode_chat(self.tokenizer, messages)
        self._opening.check_prompt(ids)
        return Prompt(messages, ids)

    def ask(self, llama: SplitLlamaForCausalLM, prompt: Prompt, streamer: Any) -> Turn:
        """Generate the answer to a prompt. Ctrl-C ends it; what was generated until then becomes a message.

        Args:
            llama: the split model.
            prompt: as ``prompt`` returns it.
            streamer: prints tokens as they come; None: nothing does.
        """
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
        """A cache that holds only the beginning of a prompt, and how many of its tokens."""
        pairs = zip(self._cached, asked, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        kept = min(same, len(asked) - 1)  # the last token is needed as input: its logits are wanted
        if self._cache is None or kept == 0:
            return llama.new_cache(), 0
        self._cache.crop(kept - len(self._cached))
        self._cached = asked[:kept]
        return self._cache, kept
