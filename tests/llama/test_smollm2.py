"""The demo model, split between two real processes, generates what transformers alone generates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from llama_split import SplitLlamaForCausalLM
from llama_split.checkpoint import Checkpoint

CHAT = ["What is the capital of France?", "Write a haiku about shared memory."]
PLAIN = "In the beginning of the nineteenth century, the"
PADDING = 2
TOKENS = 12
OPTIONS: dict[str, Any] = {
    "max_new_tokens": TOKENS,
    "min_new_tokens": TOKENS,
    "do_sample": False,
    "pad_token_id": PADDING,
}
FIVE: dict[str, Any] = {**OPTIONS, "max_new_tokens": 5, "min_new_tokens": 5}
TEN: dict[str, Any] = {**OPTIONS, "max_new_tokens": 10, "min_new_tokens": 10}


@pytest.fixture(scope="module")
def prompts(smollm2_tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Two questions in the chat template and a text to continue."""
    chats = [
        smollm2_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for text in CHAT
    ]
    return [*chats, smollm2_tokenizer(PLAIN, return_tensors="pt")["input_ids"]]


@pytest.fixture(scope="module")
def together(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The three prompts in one batch, padded on the left: a batch takes little longer than one of them."""
    longest = max(ids.shape[1] for ids in prompts)
    padded = [torch.nn.functional.pad(ids, (longest - ids.shape[1], 0), value=PADDING) for ids in prompts]
    mask = [torch.arange(longest)[None] >= longest - ids.shape[1] for ids in prompts]
    return {"input_ids": torch.cat(padded), "attention_mask": torch.cat(mask).long()}


class Choices:
    """What the unsplit model would choose, asked once for each text."""

    def __init__(self, unsplit: LlamaForCausalLM) -> None:
        self._unsplit = unsplit
        self._made: dict[tuple[int, ...], torch.Tensor] = {}

    def after(self, text: torch.Tensor) -> torch.Tensor:
        """The tokens that it would choose at each of the last ``TOKENS`` places of a text [T].

        If they are the text's own, the text is what greedy generation writes: each token is its choice after those
        before. One forward over the text takes a fraction of the time of generating it. The end token is ruled out, as
        ``min_new_tokens`` does.
        """
        key = tuple(text.tolist())
        if key not in self._made:
            with torch.no_grad():
                logits = self._unsplit(text[None, :-1], logits_to_keep=TOKENS).logits[0]
            logits[:, self._unsplit.config.eos_token_id] = -torch.inf
            self._made[key] = logits.argmax(-1)
        return self._made[key]


@pytest.fixture(scope="module")
def choices(unsplit_smollm2: LlamaForCausalLM) -> Choices:
    """What the unsplit model would choose."""
    return Choices(unsplit_smollm2)


@pytest.fixture(scope="module")
def generated(unsplit_smollm2: LlamaForCausalLM, prompts: list[torch.Tensor]) -> torch.Tensor:
    """What the unsplit model generates for the first prompt."""
    ids = prompts[0]
    tokens: torch.Tensor = unsplit_smollm2.generate(ids, attention_mask=torch.ones_like(ids), **TEN)
    return tokens


@pytest.fixture(scope="module", params=["op", "fused", "layer", "stack"])
def split(
    request: pytest.FixtureRequest,
    smollm2_starting: object,  # first, so that it loads while this process does
    unsplit_smollm2: LlamaForCausalLM,
    smollm2_checkpoint: Checkpoint,
    prompts: list[torch.Tensor],
    smollm2_address: str,
) -> Iterator[SplitLlamaForCausalLM]:
    """The demo model over a worker process, in each split."""
    with SplitLlamaForCausalLM.from_pretrained(
        smollm2_checkpoint, worker=smollm2_address, mode=request.param, dtype="float32"
    ) as model:
        yield model


def test_greedy_tokens_are_those_of_transformers(
    split: SplitLlamaForCausalLM, choices: Choices, prompts: list[torch.Tensor], together: dict[str, torch.Tensor]
) -> None:
    """The greedy tokens of each prompt are the choices of the model that transformers loads from the same file."""
    ids = together["input_ids"]
    texts = split.generate(**together, **OPTIONS)
    assert texts.shape == (len(CHAT) + 1, ids.shape[1] + TOKENS)
    assert torch.equal(texts[:, : ids.shape[1]], ids)
    for text, one in zip(texts, prompts, strict=True):
        unpadded = text[-(one.shape[1] + TOKENS) :]
        assert torch.equal(unpadded[-TOKENS:], choices.after(unpadded))


def test_a_conversation_goes_on_with_its_cache(
    split: SplitLlamaForCausalLM, prompts: list[torch.Tensor], generated: torch.Tensor
) -> None:
    """Five tokens, then five more over the returned cache, are the ten that the unsplit model generates at once."""
    ids = prompts[0]
    first = split.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **FIVE,
        return_dict_in_generate=True,
        past_key_values=split.new_cache(),
    )
    rest = split.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        **FIVE,
        past_key_values=first.past_key_values,
    )
    assert torch.equal(rest, generated)
