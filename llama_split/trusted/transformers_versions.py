"""Bridges the differences between the tested versions of transformers.

Shape suffixes: B batch, T tokens, X any width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from ..errors import UnsupportedBySplit

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.21

    def slice_logits_to_keep(rows_BTX: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """As Llama's forward did before."""
        return rows_BTX[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


CACHE_NAMES = ("cache", "past_key_values")
"""Names of the KV cache as an argument and in results: from 5.24 on, and before.

Callers may use either name with every version.
"""

CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)
"""The name in the installed version."""


def only_cache(**named: Any) -> Any:
    """The KV cache that was passed under any of its names; None if there was none.

    Raises:
        UnsupportedBySplit: it is no cache of transformers.
        ValueError: two different caches were passed.
    """
    given = {name: cache for name, cache in named.items() if cache is not None}
    for name, cache in given.items():
        if not isinstance(cache, Cache):
            raise UnsupportedBySplit(
                f"{name} is a {type(cache).__name__}: pass a Cache of transformers, for example new_cache()"
            )
    caches = list(given.values())
    if any(cache is not caches[0] for cache in caches):
        raise ValueError(f"pass one KV cache: {' and '.join(given)} name two different ones")
    return caches[0] if caches else None


def keep_logits(rows_BTX: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The rows of the tokens that ``logits_to_keep`` names: that many last ones, all for 0, or a tensor of indices."""
    kept: torch.Tensor = slice_logits_to_keep(rows_BTX, logits_to_keep)
    return kept
