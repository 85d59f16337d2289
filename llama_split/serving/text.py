"""Turns the tokens of an answer into text as they come, and ends it at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer shows for bytes that are not a whole character yet


class AnswerText:
    """The text of one answer.

    A part is handed out as soon as no later token can change it, and no stop string can have begun in it.

    Args:
        tokenizer: the model's.
        stops: strings that end the answer; none of them is part of its text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._first = 0  # of the tokens that are decoded together
        self._known = ""  # their text so far
        self._held = ""  # what may be the beginning of a stop string
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """Take the next token, and return the text that is certain by now."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._first :])
        if text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._known) :]
        last = self._decode([token])
        if last:  # from here on it alone is decoded along, for what a tokenizer puts between two
            self._first, self._known = len(self._tokens) - 1, last
        else:
            self._known = text
        return self._release(new)

    def finish(self) -> str:
        """Return what is left, after the last token."""
        text = self._decode(self._tokens[self._first :]) if self._tokens else ""
        rest = self._release(text[len(self._known) :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
