"""Checks the input of a forward and fills in transformers' defaults, for all splits.

Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, LlamaConfig

from ..errors import InvalidInput
from ..model.masks import fit_mask, packed_sequences
from ..model.rotary import TextLengths
from .history import ForwardInput


def fit_inputs(
    source: torch.Tensor,
    mask: Any,
    positions: torch.Tensor | None,
    cache: Cache | None,
    *,
    config: LlamaConfig,
    dtype: torch.dtype,
    lengths: TextLengths,
) -> ForwardInput:
    """Bring the arguments of a forward together.

    Positions tell texts that are packed into one row apart, but only without a cache and a mask, as in transformers.

    Args:
        source: token ids [B, T] or embeddings [B, T, D].
        mask: the attention mask as the caller passed it; None: every token counts.
        positions: [B or 1, T]; None: those after what the cache holds.
        cache: the KV cache to continue; None: the caller keeps none.
        config: the model's configuration.
        dtype: the dtype of activations.
        lengths: chooses the text length for the rotary frequencies.

    Raises:
        InvalidInput: there are no tokens, or the mask or the positions don't fit them.
    """
    dims = 3 if source.is_floating_point() else 2
    if source.dim() != dims or 0 in source.shape:
        named, wanted = ("inputs_embeds", "[batch, tokens, hidden]") if dims == 3 else ("input_ids", "[batch, tokens]")
        raise InvalidInput(f"{named} is {list(source.shape)}; pass {wanted}, at least one token in at least one row")
    batch, tokens = source.shape[:2]
    past = 0 if cache is None else int(cache.get_seq_length())
    if positions is None:
        positions = torch.arange(past, past + tokens).unsqueeze(0)
    elif positions.shape not in ((1, tokens), (batch, tokens)):
        raise InvalidInput(f"position_ids is {list(positions.shape)}; pass [{batch}, {tokens}] or [1, {tokens}]")
    return ForwardInput(
        source,
        positions,
        fit_mask(mask, batch, tokens, cache, heads=config.num_attention_heads, dtype=dtype),
        lengths.of(positions),
        packed_sequences(positions, batch) if cache is None and mask is None else None,
    )
