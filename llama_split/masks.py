"""Which tokens attend to which: the caller's mask made to fit, and the mask of a forward, for every split.

Shape suffixes: B batch, T tokens of this forward, S all that they may attend to, H heads, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, LlamaConfig
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from .errors import InvalidInput


def fit_mask(
    mask: Any, batch: int, tokens: int, cache: Cache | None, *, heads: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """The caller's attention mask as all splits take it, with the meaning that it has in transformers.

    One of two dimensions becomes boolean [B, S], S being what is in the ``cache`` and this forward's tokens: shorter
    ones hide what they don't cover. One of four dimensions, boolean or to be added, becomes [B or 1, H or 1, T, S].

    Raises:
        InvalidInput: it fits neither the batch nor the tokens.
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
    """Which of the texts packed into its row each token is of, [B, T]; None where every row is one text.

    As in transformers, a text begins wherever a position doesn't follow the one before.
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
    """The mask of a forward, [B, 1, T, S] in the form that ``config`` asks for; one of four dimensions as it is.

    Of packed sequences each attends to itself only. With ``may_be_none`` a mask that is causal and nothing else can be
    None, where the form allows it.
    """
    found: torch.Tensor | None = create_causal_mask(  # by position: a version of transformers renamed arguments
        config, hidden_BTD, mask, cache, None, allow_is_causal_skip=may_be_none and sequences_BS is None
    )
    if sequences_BS is None or found is None:
        return found
    own_BT = sequences_BS[:, sequences_BS.shape[1] - hidden_BTD.shape[1] :]
    same_B1TS = (own_BT[:, :, None] == sequences_BS[:, None, :])[:, None]
    return (
        found & same_B1TS if found.dtype == torch.bool else found.masked_fill(~same_B1TS, torch.finfo(found.dtype).min)
    )
