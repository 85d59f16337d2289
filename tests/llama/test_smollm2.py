"""The demo model, split between two real processes, generates what transformers alone generates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint import Checkpoint, open_checkpoint
from llama_split.commands.settings import demo_model

CHAT = ["What is the capital of France?", "Write a haiku about shared memory."]
PLAIN = "In the beginning of the nineteenth century, the"
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 2}
TEN: dict[str, Any] = {**OPTIONS, "max_new_tokens": 10, "min_new_tokens": 10}
TWENTY: dict[str, Any] = {**OPTIONS, "max_new_tokens": 20, "min_new_tokens": 20}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The demo model's file."""
    return open_checkpoint(str(demo_model()))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The demo model's tokenizer."""
    return checkpoint.tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Two questions in the chat template and a text to continue."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for text in CHAT
    ]
    return [*chats, tokenizer(PLAIN, return_tensors="pt")["input_ids"]]


def choices(unsplit: LlamaForCausalLM, text: torch.Tensor, new: int) -> torch.Tensor:
    """The tokens that the unsplit model would choose at each of the last ``new`` places of a text.

    If they are the text's own, the text is what greedy generation writes: each token is its choice after those before.
    One forward over the text takes a fraction of the time of generating it. The end token is ruled out, as
    ``min_new_tokens`` does.
    """
    with torch.no_grad():
        logits = unsplit(text[:, :-1], logits_to_keep=new).logits
    logits[..., unsplit.config.eos_token_id] = -torch.inf
    tokens: torch.Tensor = logits.argmax(-1)
    return tokens


@pytest.fixture(scope="module")
def generated(unsplit_smollm2: LlamaForCausalLM, prompts: list[torch.Tensor]) -> torch.Tensor:
    """What the unsplit model generates for the first prompt."""
    ids = prompts[0]
    tokens: torch.Tensor = unsplit_smollm2.generate(ids, attention_mask=torch.ones_like(ids), **TWENTY)
    return tokens


@pytest.fixture(scope="module", params=["op", "fused", "layer", "stack"])
def split(
    request: pytest.FixtureRequest,
    smollm2_starting: object,  # first, so that it loads while this process does
    unsplit_smollm2: LlamaForCausalLM,
    checkpoint: Checkpoint,
    prompts: list[torch.Tensor],
    smollm2_address: str,
) -> Iterator[SplitLlamaForCausalLM]:
    """The demo model over a worker process, in each split."""
    with SplitLlamaForCausalLM.from_pretrained(
        checkpoint, worker=smollm2_address, mode=request.param, dtype="float32"
    ) as model:
        yield model


@pytest.mark.parametrize("index", range(len(CHAT) + 1))
def test_greedy_tokens_are_those_of_transformers(
    split: SplitLlamaForCausalLM, unsplit_smollm2: LlamaForCausalLM, prompts: list[torch.Tensor], index: int
) -> None:
    """Forty greedy tokens of each prompt are the choices of the model that transformers loads from the same file."""
    ids = prompts[index]
    tokens = split.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    assert tokens.shape == (1, ids.shape[1] + 40)
    assert torch.equal(tokens[:, : ids.shape[1]], ids)
    assert torch.equal(tokens[:, -40:], choices(unsplit_smollm2, tokens, 40))


def test_a_conversation_goes_on_with_its_cache(
    split: SplitLlamaForCausalLM, prompts: list[torch.Tensor], generated: torch.Tensor
) -> None:
    """Ten tokens, then ten more over the returned cache, are the twenty that the unsplit model generates at once."""
    ids = prompts[0]
    first = split.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **TEN,
        return_dict_in_generate=True,
        past_key_values=split.new_cache(),
    )
    rest = split.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        **TEN,
        past_key_values=first.past_key_values,
    )
    assert torch.equal(rest, generated)
