"""Models of a known shape with random weights."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import llama_split.checkpoint.base
from llama_split import CheckpointError, SplitLlamaForCausalLM
from llama_split.checkpoint.shapes import SHAPES
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.worker.service import Service
from llama_split.worker.weights import Weights
from shmtransport import Server
from tests.support.prompts import prompt

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}


def test_an_unknown_shape_is_refused_with_those_that_there_are() -> None:
    """The error lists the known names."""
    with pytest.raises(CheckpointError, match=r"llama-9.*llama-3\.2-1b, llama-3\.1-8b, tinyllama-1\.1b"):
        RandomCheckpoint("llama-9")


@pytest.mark.parametrize("name", SHAPES)
def test_the_parameters_are_those_of_the_shape(name: str) -> None:
    """Names and shapes are those that transformers gives a Llama of this configuration."""
    checkpoint = RandomCheckpoint(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(checkpoint.config)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: checkpoint.shape(n) for n in checkpoint.names
    }


def test_weights_follow_from_name_and_seed_alone() -> None:
    """Two processes make the same numbers; another seed or tensor gives others; no two rows are alike."""
    one, same, other = (RandomCheckpoint("llama-3.2-1b", seed, **SMALL) for seed in (1, 1, 2))
    name, sibling = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(one.read(name), same.read(name))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert not torch.equal(one.read(name), other.read(name))
    assert not torch.equal(one.read(name), one.read(sibling))
    assert torch.unique(one.read(name), dim=0).shape == one.read(name).shape
    assert 0.015 < one.read(name).std().item() < 0.025


@pytest.mark.parametrize("block_numbers", [1, 1000, 3 << 20])
def test_weights_depend_on_neither_blocks_nor_dtype(block_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a side loads a matrix, its numbers repeat the pool from the matrix's offset on, rounded once."""
    monkeypatch.setattr(llama_split.checkpoint.base, "BLOCK_NUMBERS", block_numbers)
    checkpoint = RandomCheckpoint(
        "llama-3.2-1b", 4, **{**SMALL, "intermediate_size": 40_000 if block_numbers > 1 else 96}
    )
    name = "model.layers.1.mlp.up_proj.weight"
    pool = checkpoint._pool
    place = int.from_bytes(hashlib.sha256(f"4 {name}".encode()).digest()[:8], "little")
    rows, width = checkpoint.shape(name)
    expected = pool[(place % len(pool) + torch.arange(rows * width)) % len(pool)].view(rows, width)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = checkpoint.load([name], dtype, torch.device("cpu"))[name]
        assert torch.equal(loaded, expected.to(dtype)), dtype
    assert torch.equal(checkpoint.rows(name, 7, 9), expected[7:9])


@pytest.mark.parametrize("mode", ["fused", "stack"])
def test_both_sides_run_the_same_random_model(address: str, mode: str) -> None:
    """A split of random weights gives the logits of the unsplit model with these weights."""
    checkpoint = RandomCheckpoint("tinyllama-1.1b", 3, **SMALL)
    unsplit = LlamaForCausalLM(checkpoint.config).eval()
    unsplit.load_state_dict({name: checkpoint.read(name) for name in checkpoint.names}, strict=True)
    with Server(address) as server:
        Service(server, Weights(checkpoint, torch.float32, torch.device("cpu")), checkpoint)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            mine = RandomCheckpoint("tinyllama-1.1b", 3, **SMALL)
            with SplitLlamaForCausalLM.from_pretrained(mine, worker=address, mode=mode, dtype="float32") as split:
                logits = split(prompt(9) % 300).logits
                torch.testing.assert_close(logits, unsplit(prompt(9) % 300).logits, atol=1e-5, rtol=1e-5)
        finally:
            server.stop()
            thread.join()


def test_its_tokenizer_has_a_token_for_each_byte() -> None:
    """Any text comes back from its tokens."""
    tokenizer = RandomCheckpoint("tinyllama-1.1b").tokenizer()
    text = "What is 1 + 1?\n Zwölf – €"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
