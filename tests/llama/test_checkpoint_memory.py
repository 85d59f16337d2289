"""Peak memory of loading: the result and little more, however large a tensor is and however it is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

from llama_split.checkpoint import EMBEDDING, Checkpoint, open_checkpoint
from llama_split.checkpoint.synthetic import RandomCheckpoint
from shmtransport.units import MIB
from tests.support.checkpoints import as_gguf, growth_of_peak

ROWS, WIDTH = 32768, 1024
RESULT_BYTES = ROWS * WIDTH * 2
BESIDE_BYTES = 40 * MIB  # a few blocks of 4 MiB and what they are made of; a float32 copy would be 128 MiB
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A model that is little more than its embedding."""
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def safetensors(model: LlamaForCausalLM, directory: Path) -> Checkpoint:
    model.save_pretrained(directory)
    return open_checkpoint(str(directory))


def as_kind(kind: Kind) -> Callable[[LlamaForCausalLM, Path], Checkpoint]:
    return lambda model, directory: open_checkpoint(str(as_gguf(model, directory / "model.gguf", kind=kind)))


def random_weights(_model: LlamaForCausalLM, _directory: Path) -> Checkpoint:
    return RandomCheckpoint("llama-3.2-1b", **SIZES)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(safetensors, id="safetensors"),
        pytest.param(as_kind(Kind.F32), id="gguf-F32"),
        pytest.param(as_kind(Kind.Q8_0), id="gguf-Q8_0"),
        pytest.param(random_weights, id="random weights"),
    ],
)
def test_loading_holds_little_beside_the_result(
    make: Callable[[LlamaForCausalLM, Path], Checkpoint], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Neither a float32 copy nor the file's own pages stay in memory beside a large matrix in bfloat16."""
    checkpoint = make(model, tmp_path)
    grown = growth_of_peak(lambda: checkpoint.load([EMBEDDING], torch.bfloat16, torch.device("cpu")))
    assert RESULT_BYTES // 2 < grown < RESULT_BYTES + BESIDE_BYTES


def test_stacking_holds_little_beside_the_result() -> None:
    """Parts are read straight into their rows: they never exist twice."""
    checkpoint = RandomCheckpoint("llama-3.2-1b", **{**SIZES, "intermediate_size": ROWS // 2})
    group = {"gate_up": [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]}
    grown = growth_of_peak(lambda: checkpoint.load_stacked(group, torch.bfloat16, torch.device("cpu")))
    assert RESULT_BYTES // 2 < grown < RESULT_BYTES + BESIDE_BYTES
