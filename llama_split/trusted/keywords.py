"""Keywords of a forward that transformers' Llama takes without naming them in its signature.

It passes them to its attention functions and to the loss. Those that change nothing there are taken here as well, the
loss's own go to the loss, and any other is refused by its name: in an unsplit model it could change the numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedBySplit

WITHOUT_EFFECT = frozenset(
    {
        "assistant_tokenizer",  # this and others come from generate, which passes on what it was given
        "cache_position",
        "cu_seq_lens_k",  # read by flash attention alone; packed sequences are told by their position_ids
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "output_router_logits",
        "seq_idx",
        "streamer",
        "synced_gpus",
        "token_type_ids",
        "tokenizer",
    }
)


def check_keywords(keywords: dict[str, Any], loss_function: Callable[..., Any]) -> None:
    """Refuse what neither a Llama without a loss ignores nor its loss takes; None is as if it was not passed.

    Raises:
        UnsupportedBySplit: one is neither.
    """
    taken = WITHOUT_EFFECT | inspect.signature(loss_function).parameters.keys()
    for name, value in keywords.items():
        causal = name == "is_causal" and value is True
        if value is not None and name not in taken and not causal:
            raise UnsupportedBySplit(
                f"forward takes no {name} in a split model: it could change the unsplit one's result"
            )
