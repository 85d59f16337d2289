"""What a forward is given, made to fit, in one place for all splits.

Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, LlamaConfig

from ..errors import InvalidInput
from ..masks import fit_mask, packed_sequences
from ..rotary import TextLengths
from .history import Tokens


def fit_inputs(
    source: torch.Tensor,
    mask: Any,
    positions: torch.Tensor | None,
    cache: Cache | None,
    *,
    config: LlamaConfig,
    dtype: torch.dtype,
    lengths: TextLengths,
) -> Tokens:
    """The tokens of a forward after what is in the ``cache``, with the defaults that transformers has.

    ``source`` is ids [B, T] or embeddings [B, T, D]; ``cache`` is None where the caller keeps none. Texts may be packed
    into a row, told by their positions, where transformers looks for them: without a cache and without a mask.

    Raises:
        InvalidInput: there are no tokens, or mask or positions don't fit them.
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
    return Tokens(
        source,
        positions,
        fit_mask(mask, batch, tokens, cache, heads=config.num_attention_heads, dtype=dtype),
        lengths.of(positions),
        packed_sequences(positions, batch) if cache is None and mask is None else None,
    )
