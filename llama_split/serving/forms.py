"""Holds an answer to a form: JSON, or JSON of a schema, by llguidance, which tells which tokens may come next.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import InvalidRequest

_ANY_OBJECT = {"type": "object"}
_PARAM = "response_format"


class Grammar:
    """The form of one answer, as far as that has come."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def hide(self, scores_V: torch.Tensor) -> torch.Tensor:
        """The scores, with those of tokens that can't come next at minus infinity."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.zeros(len(scores_V), dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: len(scores_V)]
        allowed[: len(known)] = known
        return scores_V.masked_fill(~torch.from_numpy(allowed), -torch.inf)

    def take(self, token: int) -> None:
        """The next token is this one, which ``hide`` has left."""
        self._matcher.consume_token(token)


@dataclass(frozen=True)
class Form:
    """A form that answers can be held to."""

    tokenizer: Any
    grammar: str

    def begin(self) -> Grammar:
        """The form of an answer that begins."""
        import llguidance

        return Grammar(llguidance.LLMatcher(self.tokenizer, self.grammar))


class Forms:
    """Makes forms for one model.

    Args:
        tokenizer: the model's.
        vocabulary: how many tokens the model knows.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = ends
        self._known: Any = None

    def of(self, kind: str, schema: dict[str, Any] | None) -> Form | None:
        """The form that a request asks for; None for plain text.

        Args:
            kind: the ``type`` of its ``response_format``.
            schema: the JSON schema, where that is the type.

        Raises:
            InvalidRequest: there is no such form, the schema is none, or this model can't be held to one.
        """
        if kind == "text":
            return None
        if kind not in ("json_object", "json_schema"):
            raise InvalidRequest(f"response_format {kind!r} is none of text, json_object and json_schema", _PARAM)
        wanted = _ANY_OBJECT if kind == "json_object" else schema
        if wanted is None:
            raise InvalidRequest("response_format json_schema needs a schema", _PARAM)
        import llguidance

        tokenizer = self._prepared()
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(wanted), defaults={"whitespace_flexible": False}
        )
        if error := llguidance.LLMatcher.validate_grammar(grammar, tokenizer):
            raise InvalidRequest(f"response_format: {' '.join(error.split())[:300]}", _PARAM)
        return Form(tokenizer, grammar)

    def _prepared(self) -> Any:
        """The tokenizer as llguidance needs it, made for the first request that asks for a form."""
        if self._known is None:
            import llguidance.hf

            try:
                self._known = llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary, self._ends or None)
            except Exception as error:
                raise InvalidRequest(
                    f"answers of this model can't be held to a form: {error or type(error).__name__}", _PARAM
                ) from error
        return self._known
