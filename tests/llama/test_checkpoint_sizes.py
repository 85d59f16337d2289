"""Sizes and settings from files: any value gives a model or a one-line refusal, in bounded memory."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_split.checkpoint import open_checkpoint
from shmtransport.units import MIB
from tests.support.checkpoints import as_gguf, changed, edit_config, growth_of_peak, refusal
from tests.support.llamas import Small, random_llama

SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
WRONG = (0, -1, 1.5, "many", True, [3], 1 << 31, 1 << 63, 10**30)
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}


def copy(small: Small, directory: Path, **config: Any) -> Path:
    changed(small, directory, lambda _tensors: None)
    edit_config(directory, **config)
    return directory


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_size_that_is_none_is_refused_by_its_name(plain: Small, tmp_path: Path, name: str, value: Any) -> None:
    """Zero, negative, not a whole number, far too large: refused before anything is allocated for it."""
    copy(plain, tmp_path, **{name: value})
    assert growth_of_peak(lambda: name in refusal(tmp_path)) < 50 * MIB
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("name", [name for name in SIZES if name != "max_position_embeddings"])
@pytest.mark.parametrize("value", [1, 7, 1 << 20, (1 << 31) - 2], ids=repr)
def test_a_size_that_the_files_contradict_is_refused_in_bounded_memory(
    plain: Small, tmp_path: Path, name: str, value: int
) -> None:
    """The loader builds no list or table whose size only the configuration claims."""
    copy(plain, tmp_path, **{name: value})
    if (name, value) in (
        ("num_hidden_layers", 1),
    ):  # fewer layers than the files hold: transformers computes with these
        assert open_checkpoint(str(tmp_path)).geometry.layers == 1
    else:
        assert growth_of_peak(lambda: refusal(tmp_path)) < 50 * MIB


def test_one_layer_too_many_is_refused_with_both_numbers(plain: Small, tmp_path: Path) -> None:
    """The error gives the number of layers in the files and in the configuration."""
    text = refusal(copy(plain, tmp_path, num_hidden_layers=4))
    assert "holds 3 layers" in text
    assert "4" in text


def test_heads_that_can_not_share_keys_are_refused(plain: Small, tmp_path: Path) -> None:
    """Each key/value head serves the same number of query heads."""
    assert "evenly" in refusal(copy(plain, tmp_path, num_key_value_heads=3))


def test_an_odd_head_is_refused(plain: Small, tmp_path: Path) -> None:
    """Rotary positions turn pairs of numbers."""
    assert "even" in refusal(copy(plain, tmp_path, head_dim=15))


@pytest.mark.parametrize("value", [160, 161, 10**9, -161])
def test_a_padding_token_beyond_the_vocabulary_is_refused(plain: Small, tmp_path: Path, value: int) -> None:
    """The unsplit model refuses it too."""
    assert "pad_token_id" in refusal(copy(plain, tmp_path, pad_token_id=value))


@pytest.mark.parametrize("value", [None, 0, 159, -1])
def test_a_padding_token_that_transformers_takes_is_taken(plain: Small, tmp_path: Path, value: int | None) -> None:
    """Among them the -1 of the first Llama."""
    assert open_checkpoint(str(copy(plain, tmp_path, pad_token_id=value))).config.pad_token_id == value


@pytest.mark.parametrize(
    "rope",
    [
        {**ROPE, "rope_type": "no such type"},
        {**ROPE, "rope_type": None},
        {**ROPE, "rope_type": ["yarn"]},
        {**ROPE, "rope_type": "yarn", "factor": 0},
        {**ROPE, "rope_type": "yarn", "factor": "4"},
        {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": "x"},
        {**ROPE, "rope_type": "linear", "factor": 0.0},
        {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": None},
        {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
        {**ROPE, "rope_type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8},
        {**ROPE, "rope_type": "dynamic", "factor": "4"},
        {"rope_type": "default", "rope_theta": 0.0},
        {"rope_type": "default", "rope_theta": -1.0},
        {"rope_type": "default", "rope_theta": "10000"},
        {"rope_type": "default", "rope_theta": float("nan")},
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 2.0**31},
    ],
    ids=str,
)
def test_rotary_positions_that_can_not_be_computed_are_refused(
    plain: Small, tmp_path: Path, rope: dict[str, Any]
) -> None:
    """The refusal comes when the model is opened, for the first and the last position: not in the first forward."""
    assert "rotary" in refusal(copy(plain, tmp_path, rope_parameters=rope)).replace("rotates", "rotary")


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": float("nan")},
        {"dtype": "nn"},
        {"dtype": "no such dtype"},
        {"num_labels": 1 << 31},
        {"hidden_act": ["silu"]},
        {"eos_token_id": "x"},
        {"transformers_weights": 3},
        {"transformers_weights": "../model.safetensors"},
    ],
    ids=str,
)
def test_other_values_that_can_not_be_used_are_refused(plain: Small, tmp_path: Path, change: dict[str, Any]) -> None:
    """Settings other than sizes."""
    assert str(tmp_path) in refusal(copy(plain, tmp_path, **change))


def fields(**values: int) -> Callable[[gguf.GGUFWriter], None]:
    """Write sizes of a Llama as 64-bit numbers."""

    def add(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            key = f"llama.{name.replace('__', '.')}"
            del writer.kv_data[0][key]
            (writer.add_uint64 if value >= 0 else writer.add_int64)(key, value)

    return add


@pytest.mark.parametrize("value", [0, -1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
@pytest.mark.parametrize(
    "name",
    [
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "rope__dimension_count"),
        *("attention__head_count", "attention__head_count_kv"),
    ],
)
def test_sizes_of_a_gguf_file_are_checked_alike(tmp_path: Path, name: str, value: int) -> None:
    """The same rule applies in the same place."""
    file = as_gguf(random_llama(), tmp_path / "model.gguf", more=fields(**{name: value}))
    assert growth_of_peak(lambda: refusal(file)) < 50 * MIB
    assert "whole number" in refusal(file)


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT8, gguf.GGUFValueType.FLOAT64])
@pytest.mark.parametrize("count", [1 << 62, 1 << 63, (1 << 64) - 1])
def test_an_array_longer_than_its_file_is_refused(tmp_path: Path, kind: gguf.GGUFValueType, count: int) -> None:
    """The length comes from the file, and may be anything."""
    name = b"tokenizer.ggml.tokens"
    array = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, count)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array + bytes(4096))
    assert "ends within its header" in refusal(file)


@pytest.mark.parametrize("length", [1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_word_longer_than_its_file_is_refused(tmp_path: Path, length: int) -> None:
    """As an array's item, which is skipped, as a value and as a name."""
    file, word = tmp_path / "model.gguf", struct.pack("<Q", length)
    key = struct.pack("<Q", 1) + b"a"
    for field in (
        word,
        key + struct.pack("<I", gguf.GGUFValueType.STRING) + word,
        key + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, 3) + word,
    ):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(64))
        assert "ends within its header" in refusal(file)


def test_every_end_that_a_gguf_file_names_ends_a_generation(tmp_path: Path) -> None:
    """The end of a turn and of a message as well as that of a text; the configuration stays as in transformers."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 8)

    checkpoint = open_checkpoint(str(as_gguf(random_llama(), tmp_path / "model.gguf", more=add)))
    assert checkpoint.generation_config().eos_token_id == [2, 7, 8]
    assert checkpoint.config.eos_token_id == 2


@pytest.mark.parametrize("same", [True, False])
def test_one_end_is_one_number(tmp_path: Path, same: bool) -> None:
    """Most files name the same token twice, or one."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_eos_token_id(2)
        if same:
            writer.add_eot_token_id(2)

    checkpoint = open_checkpoint(str(as_gguf(random_llama(), tmp_path / "model.gguf", more=add)))
    assert checkpoint.generation_config().eos_token_id == 2
