"""Prompts as token ids, and one answer to them: what ``generate`` and ``chat`` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import LlamaSplitError
from .options import Sampling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..trusted.model import SplitLlamaForCausalLM

Message = dict[str, str]
"""A chat's message: its ``role`` and its ``content``."""


def check_text(text: str) -> str:
    """A text as it is, if it is one.

    Raises:
        LlamaSplitError: bytes that are no UTF-8 were given on the command line.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LlamaSplitError("the text is not valid UTF-8") from error
    return text


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids [1, T] of plain text."""
    ids: torch.Tensor = tokenizer(check_text(text), return_tensors="pt")["input_ids"]
    return ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> torch.Tensor:
    """Token ids [1, T] of a chat up to where its next answer begins.

    Raises:
        LlamaSplitError: the model's chat template fails.
    """
    for message in messages:
        check_text(message["content"])
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is the model's own program and may raise anything
        raise LlamaSplitError(
            f"the model's chat template can't be used: {error}; try `llama-split generate --no-chat`"
        ) from error
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def answer(llama: SplitLlamaForCausalLM, ids: torch.Tensor, limit: int, sampling: Sampling, **more: Any) -> list[int]:
    """The ids of at most ``limit`` new tokens after ``ids`` [1, T]; ``more`` goes to transformers' ``generate``."""
    import torch

    padding = llama.config.pad_token_id
    output = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        pad_token_id=0 if padding is None else padding,
        **sampling.arguments(),
        **more,
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def printer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A streamer that prints tokens as they come."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def about(llama: SplitLlamaForCausalLM) -> dict[str, Any]:
    """How a model is split and reached, and with how many threads this side computes, for JSON."""
    import torch

    from ..config import DTYPE_NAMES

    client = llama.link.client
    return {
        "mode": llama.mode.value,
        "dtype": DTYPE_NAMES[llama.dtype],
        "wire_dtype": DTYPE_NAMES[llama.link.wire],
        "threads": torch.get_num_threads(),
        "transport": {"address": client.address, "kind": client.transport, "channel": client.channel},
    }
