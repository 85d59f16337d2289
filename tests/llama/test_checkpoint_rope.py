"""Scaled rotary positions in GGUF files: the same cosines, sines and logits as in the model that was converted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_split.checkpoint import LM_HEAD, Checkpoint, open_checkpoint
from llama_split.checkpoint.gguf_rope import FREQUENCY_FACTORS
from tests.support.checkpoints import CPU, as_gguf, needed, refusal
from tests.support.llamas import random_llama

Add = Callable[[gguf.GGUFWriter], None]

META_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OTHER_ROPE = {**META_ROPE, "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes for Llama 3's scaling, number by number as it does."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_dim)
        if wavelength < rope["original_max_position_embeddings"] / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > rope["original_max_position_embeddings"] / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            ratio = rope["original_max_position_embeddings"] / wavelength
            smooth = (ratio - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def with_factors(factors: np.ndarray[Any, Any]) -> Add:
    return lambda writer: writer.add_tensor(FREQUENCY_FACTORS, factors)


def scaled(kind: str | None = None, factor: float | None = None, **more: float) -> Add:
    """Write ``llama.rope.scaling`` fields."""

    def add(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_string("llama.rope.scaling.type", kind)
        for name, value in {"factor": factor, **more}.items():
            if value is not None:
                (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(
                    f"llama.rope.scaling.{name}", value
                )

    return add


def assert_same_model(checkpoint: Checkpoint, model: LlamaForCausalLM) -> None:
    """Check that cosines and sines at near and far positions, and logits, are the model's."""
    hidden, positions = torch.zeros(1), torch.arange(0, 1024).unsqueeze(0)
    found = LlamaRotaryEmbedding(checkpoint.config)(hidden, positions)
    for mine, theirs in zip(found, LlamaRotaryEmbedding(model.config)(hidden, positions), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0.0)  # a frequency's last bit, times 1024
    mine = LlamaForCausalLM(checkpoint.config).eval()
    missing = mine.load_state_dict(checkpoint.load(needed(checkpoint), torch.float32, CPU), strict=False).missing_keys
    assert set(missing) <= {LM_HEAD}
    ids = torch.randint(0, 160, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, model(ids).logits, atol=2e-3, rtol=1e-3)


def test_llama3s_factors_are_read_as_llama3s_parameters(tmp_path: Path) -> None:
    """A file of Llama 3.1 or 3.2 has the configuration, and so the fingerprint, of the model's safetensors files."""
    model = random_llama(rope_parameters=META_ROPE, head_dim=64, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "directory")
    file = as_gguf(model, tmp_path / "model.gguf", more=with_factors(llama3_factors(META_ROPE, 64)))
    checkpoint = open_checkpoint(str(file))
    assert checkpoint.config.rope_parameters == META_ROPE
    assert checkpoint.fingerprint() == open_checkpoint(str(tmp_path / "directory")).fingerprint()
    assert_same_model(checkpoint, model)


def test_factors_that_are_not_llama3s_are_used_one_by_one(tmp_path: Path) -> None:
    """Whatever factors a file has, each inverse frequency is divided by its own, before and after any length."""
    model = random_llama(rope_parameters=OTHER_ROPE)
    factors = llama3_factors(OTHER_ROPE, 16)
    assert len(set(factors.tolist())) > 2
    checkpoint = open_checkpoint(str(as_gguf(model, tmp_path / "model.gguf", more=with_factors(factors))))
    rotary = LlamaRotaryEmbedding(checkpoint.config)
    plain = 1.0 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    assert rotary.attention_scaling == 1.0
    for length in (1, 5000):
        rotary(torch.zeros(1), torch.arange(length).unsqueeze(0))
        torch.testing.assert_close(rotary.inv_freq, plain / torch.from_numpy(factors), atol=0.0, rtol=1e-6)
    assert_same_model(checkpoint, model)


def test_factors_of_fewer_digits_are_the_same_model(tmp_path: Path) -> None:
    """A config.json that has the factors in decimal has the fingerprint of the file that has them in binary."""
    model = random_llama(rope_parameters=OTHER_ROPE)
    file = as_gguf(model, tmp_path / "model.gguf", more=with_factors(llama3_factors(OTHER_ROPE, 16)))
    checkpoint = open_checkpoint(str(file))
    rope = checkpoint.config.rope_parameters
    digits = [float(f"{factor:.8g}") for factor in rope["short_factor"]]
    assert digits != rope["short_factor"]
    model.config.rope_parameters = {**rope, "short_factor": digits, "long_factor": digits}
    model.save_pretrained(tmp_path / "directory")
    assert open_checkpoint(str(tmp_path / "directory")).fingerprint() == checkpoint.fingerprint()


@pytest.mark.parametrize(
    ("add", "rope"),
    [
        pytest.param(scaled("none"), {"rope_type": "default", "rope_theta": 10000.0}, id="none"),
        pytest.param(scaled("none", 4.0), {"rope_type": "default", "rope_theta": 10000.0}, id="none with a factor"),
        pytest.param(scaled("linear", 4.0), {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, id="linear"),
        pytest.param(scaled(None, 2.0), {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, id="by factor"),
        pytest.param(scaled("linear", 0.0), {"rope_type": "default", "rope_theta": 10000.0}, id="linear by nothing"),
        pytest.param(
            lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            id="the field of old files",
        ),
        pytest.param(scaled("yarn", 4.0, original_context_length=256), YARN, id="yarn"),
        pytest.param(
            scaled("yarn", 4.0, original_context_length=256, yarn_beta_fast=16.0, yarn_beta_slow=2.0),
            {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
            id="yarn with betas",
        ),
        pytest.param(
            scaled("yarn", 4.0, original_context_length=256, attn_factor=0.5),
            {**YARN, "attention_factor": 0.5 * (0.1 * math.log(4.0) + 1.0)},
            id="yarn with an attention factor",
        ),
    ],
)
def test_linear_and_yarn_scaling_are_read(add: Add, rope: dict[str, Any], tmp_path: Path) -> None:
    """The fields that llama.cpp writes are transformers' parameters of the same name and arithmetic."""
    model = random_llama(rope_parameters=dict(rope))
    checkpoint = open_checkpoint(str(as_gguf(model, tmp_path / "model.gguf", more=add)))
    assert checkpoint.config.rope_parameters == rope
    assert_same_model(checkpoint, model)


@pytest.mark.parametrize(
    ("add", "said"),
    [
        pytest.param(scaled("longrope", 4.0), "linear, yarn and factors", id="another kind"),
        pytest.param(scaled("linear", 0.5), "0.5", id="a factor below one"),
        pytest.param(scaled("linear", math.nan), "nan", id="no number"),
        pytest.param(scaled("yarn", 4.0, yarn_ext_factor=0.5), "yarn_ext_factor", id="partial yarn"),
        pytest.param(scaled("yarn", 4.0, yarn_log_multiplier=0.1), "yarn_log_multiplier", id="yarn of DeepSeek"),
        pytest.param(with_factors(np.ones(7, np.float32)), "7 factors", id="too few factors"),
        pytest.param(with_factors(np.array([1.0] * 7 + [0.0], np.float32)), "positive", id="a factor of zero"),
        pytest.param(with_factors(np.array([1.0] * 7 + [np.nan], np.float32)), "positive", id="a factor of no number"),
    ],
)
def test_scaling_of_another_kind_is_refused(add: Add, said: str, tmp_path: Path) -> None:
    """Positions that would be computed wrongly are an error, which says what is supported."""
    assert said in refusal(as_gguf(random_llama(), tmp_path / "model.gguf", more=add))


def test_two_scalings_at_once_are_refused(tmp_path: Path) -> None:
    """Factors for each frequency together with a linear factor have no agreed meaning."""

    def add(writer: gguf.GGUFWriter) -> None:
        scaled("linear", 4.0)(writer)
        with_factors(np.full(8, 2.0, np.float32))(writer)

    assert "at once" in refusal(as_gguf(random_llama(), tmp_path / "model.gguf", more=add))
