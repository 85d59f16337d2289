"""Prompts for the small models, options to generate with, and how much a counter grew."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from shmtransport import Statistics

NEW_TOKENS = 24
LONG: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
SHARED_TOKENS = 16
SHARED: dict[str, Any] = {"max_new_tokens": SHARED_TOKENS, "pad_token_id": 0}
STATIC = GenerationConfig(cache_implementation="static", max_new_tokens=3, pad_token_id=0)
QUANTIZED = GenerationConfig(cache_implementation="quantized", max_new_tokens=3, pad_token_id=0)


def prompt(tokens: int = 11, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(2, 160, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded_prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    ids, mask = prompt(12, batch=3), torch.ones(3, 12, dtype=torch.int64)
    for row, padding in enumerate((5, 0, 9)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def single_prompt() -> dict[str, torch.Tensor]:
    ids = prompt()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Spelled:
    """The part of a tokenizer that streamers use: a token is spelled by its number."""

    def decode(self, ids: Any, **_kwargs: Any) -> str:
        return "".join(f"{int(token)} " for token in torch.as_tensor(ids).reshape(-1))


def difference(before: Statistics, after: Statistics, field: str) -> int:
    """How much a counter grew."""
    grown: int = getattr(after, field) - getattr(before, field)
    return grown
