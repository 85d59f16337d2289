"""Keywords that transformers' Llama accepts in a forward without naming them in its signature.

It passes them to its attention functions and to the loss. A split model accepts those that change nothing there and
those of the loss, and refuses any other by name: in an unsplit model it could change the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedBySplit

WITHOUT_EFFECT = frozenset(
    {
        "assistant_tokenizer",  # this one and others come from generate, which passes on its own keywords
        "cache_position",
        "cu_seq_lens_k",  # read by flash attention only; position_ids tell packed sequences apart
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
    """Refuse keywords that could change the result of an unsplit model; one that is None counts as not passed.

    Raises:
        UnsupportedBySplit: a keyword is neither without effect nor an argument of the loss.
    """
    taken = WITHOUT_EFFECT | inspect.signature(loss_function).parameters.keys()
    for name, value in keywords.items():
        causal = name == "is_causal" and value is True
        if value is not None and name not in taken and not causal:
            raise UnsupportedBySplit(
                f"forward takes no {name} in a split model: it could change the unsplit one's result"
            )
