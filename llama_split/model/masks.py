"""Attention masks, for every split: what callers may pass, and the mask of a forward made from it.

Shape suffixes: B batch, T tokens of this forward, S all tokens they may attend to (cached ones and these), H heads,
D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, LlamaConfig
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from ..errors import InvalidInput


def fit_mask(
    mask: Any, batch: int, tokens: int, cache: Cache | None, *, heads: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """Bring a caller's attention mask into the form that all splits take; its meaning stays transformers'.

    A mask of two dimensions becomes boolean [B, S]; one shorter than S hides the tokens that it does not cover. A mask
    of four dimensions, boolean or additive, becomes [B or 1, H or 1, T, S].

    Args:
        mask: what the caller passed; None: no mask.
        batch: rows of the forward.
        tokens: tokens per row of the forward.
        cache: what the forward continues from; None: nothing.
        heads: attention heads of the model.
        dtype: the dtype that an additive mask may have besides float32.

    Raises:
        InvalidInput: the mask is no tensor, or does not fit the batch, the tokens or the dtype.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise InvalidInput(f"attention_mask is a {type(mask).__name__}; pass a tensor")
    if mask.dim() == 2:
        return _fit_padding(mask.bool(), batch, tokens, cache)
    if mask.dim() == 4:
        total = tokens if cache is None else int(cache.get_mask_sizes(tokens, 0)[0])
        return _fit_prepared(mask, (batch, heads, tokens, total), dtype)
    raise InvalidInput(
        f"attention_mask is {list(mask.shape)}; pass [batch, tokens], or [batch, heads, tokens, all tokens]"
    )


def _fit_padding(mask: torch.Tensor, batch: int, tokens: int, cache: Cache | None) -> torch.Tensor:
    rows, width = mask.shape
    total = tokens + (0 if cache is None else int(cache.get_seq_length()))
    if rows == 1 < batch and mask.all():
        mask = mask.expand(batch, -1)
    elif rows != batch:
        raise InvalidInput(f"attention_mask has {rows} rows, the batch has {batch}")
    if width == total:
        return mask
    if cache is None and not (mask[:, :total].all() and not mask[:, total:].any()):
        raise InvalidInput(f"attention_mask covers {width} tokens of {total}, and without a cache it must cover all")
    if cache is None:
        return mask.new_ones(batch, total)
    return torch.nn.functional.pad(mask, (0, max(total - width, 0)))[:, :total]


def _fit_prepared(mask: torch.Tensor, wanted: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise InvalidInput(f"attention_mask is of {mask.dtype}; one of four dimensions is of torch.bool or {dtype}")
    if any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True)):
        raise InvalidInput(f"attention_mask is {list(mask.shape)}; this forward takes {list(wanted)}, or 1 for any")
    return mask.expand(*mask.shape[:2], *wanted[2:])


def packed_sequences(positions_BT: torch.Tensor, batch: int) -> torch.Tensor | None:
    """The index of each token's text in its row, [B, T]; None where every row is a single text.

    As in transformers, a text begins wherever a position does not follow the previous one.
    """
    found: torch.Tensor | None = find_packed_sequence_indices(positions_BT.expand(batch, -1))
    return found


def causal_mask(
    config: LlamaConfig,
    hidden_BTD: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Cache | None,
    *,
    sequences_BS: torch.Tensor | None = None,
    may_be_none: bool = True,
) -> torch.Tensor | None:
    """The mask of a forward, [B, 1, T, S], in the form that ``config`` selects.

    Args:
        config: names the attention implementation, which decides between a boolean and an additive mask.
        hidden_BTD: the embeddings; only their shape, dtype and device matter.
        mask: as ``fit_mask`` returns it; one of four dimensions is returned as it is.
        cache: what the forward continues from; None: nothing.
        sequences_BS: the index of each token's text where several are packed into a row; texts don't attend to each
            other.
        may_be_none: return None for a mask that is only causal, where the form allows that.
    """
    found: torch.Tensor | None = create_causal_mask(  # by position: transformers has renamed these arguments
        config, hidden_BTD, mask, cache, None, allow_is_causal_skip=may_be_none and sequences_BS is None
    )
    if sequences_BS is None or found is None:
        return found
    own_BT = sequences_BS[:, sequences_BS.shape[1] - hidden_BTD.shape[1] :]
    same_B1TS = (own_BT[:, :, None] == sequences_BS[:, None, :])[:, None]
    return (
        found & same_B1TS if found.dtype == torch.bool else found.masked_fill(~same_B1TS, torch.finfo(found.dtype).min)
    )
