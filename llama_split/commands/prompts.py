"""Encodes prompts and generates one answer: what ``generate`` and ``chat`` have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import LlamaSplitError
from .decoding import decoding
from .options import Sampling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..trusted.model import SplitLlamaForCausalLM

Message = dict[str, str]
"""One message of a chat: its ``role`` and its ``content``."""

_KEPT = "\n\t\u200c\u200d\ufe0e\ufe0f"  # line breaks, tabs, and what joins letters and emoji


def check_text(text: str) -> str:
    """Decode a text's bytes as UTF-8, whatever the encoding of this process is.

    Raises:
        LlamaSplitError: the bytes given on the command line are no UTF-8.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError as error:
        raise LlamaSplitError("the text is not valid UTF-8") from error


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids [1, T] of plain text.

    Raises:
        LlamaSplitError: the model's tokenizer fails.
    """
    text = check_text(text)
    with _failing("the model's tokenizer can't encode the text"):
        ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> torch.Tensor:
    """Token ids [1, T] of a chat, up to the beginning of its next answer.

    Raises:
        LlamaSplitError: the model's chat template or its tokenizer fails.
    """
    messages = [{**message, "content": check_text(message["content"])} for message in messages]
    with _failing("the model's chat template can't be used", "; try `llama-split generate --no-chat`"):
        ids: torch.Tensor = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of the tokens of an answer.

    Raises:
        LlamaSplitError: the model's tokenizer fails.
    """
    with _failing("the model's tokenizer can't decode the answer"):
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


@contextlib.contextmanager
def _failing(what: str, remedy: str = "") -> Iterator[None]:
    """Name what failed: a tokenizer and a template are programs that come with a model and may raise anything."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the tokenizer's Rust code is no Exception
        raise LlamaSplitError(f"{what}: {error or type(error).__name__}{remedy}") from error


def answer(
    llama: SplitLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    limit: int,
    sampling: Sampling,
    **more: Any,
) -> list[int]:
    """Generate one answer.

    Args:
        llama: the split model.
        tokenizer: the model's; transformers finds the model's stop strings with it.
        ids: token ids [1, T] of the prompt.
        limit: the most new tokens.
        sampling: how tokens are chosen.
        more: passed to transformers' ``generate``.

    Returns:
        The ids of the new tokens.
    """
    import torch

    output = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=decoding(llama.generation_config, limit, sampling.arguments()),
        tokenizer=tokenizer,
        **more,
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def printer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A streamer that prints tokens as they come, with terminal control sequences made visible."""
    from transformers import TextStreamer

    from shmtransport.text import printable

    class Printer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep=_KEPT), stream_end)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def about(llama: SplitLlamaForCausalLM) -> dict[str, Any]:
    """How a model is split and reached, and the number of threads of this side, for JSON."""
    import torch

    from ..boundary.compute import DTYPE_NAMES

    client = llama.workers.last.client
    return {
        "mode": llama.mode.value,
        "dtype": DTYPE_NAMES[llama.dtype],
        "wire_dtype": str(llama.workers.wire).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "transport": {"address": ", ".join(llama.workers.addresses), "kind": client.scheme, "channel": client.channel},
    }
