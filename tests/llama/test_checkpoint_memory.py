"""Peak memory of loading: the result and little more, however large a tensor is and however it is stored."""

from __future__ import annotations

import json
import subprocess
import sys
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

# Prints this process's peak of resident memory, of every kind, before and after loading, in KiB.
TRUSTED_SIDE = """
import json, sys, torch
from llama_split.boundary.operations import Mode
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.trusted.model import SplitLlamaForCausalLM
from llama_split.trusted.part import TrustedPart
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
checkpoint = RandomCheckpoint("llama-3.2-1b")
names = TrustedPart.weight_names(checkpoint.config, Mode.FUSED)
loaded = checkpoint.load(names, torch.bfloat16, torch.device("cpu"))
checkpoint.fingerprint()
print(json.dumps([before * 1024, peak() * 1024, loaded["model.embed_tokens.weight"].nbytes]))
"""


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


def test_the_trusted_process_of_llama_1b_stays_near_its_embedding() -> None:
    """Mode fused in bfloat16: the whole process, imports included, peaks below the embedding plus 400 MiB."""
    done = subprocess.run([sys.executable, "-c", TRUSTED_SIDE], capture_output=True, text=True, check=True)
    before, peak, embedding = json.loads(done.stdout)
    assert embedding == 501 * MIB
    assert peak < embedding + 400 * MIB
    assert peak - before < embedding + BESIDE_BYTES
