"""GGUF files: each gives the model it was converted from, in any quantisation; other files are refused."""

from __future__ import annotations

import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaForCausalLM

import llama_split.checkpoint.base
from llama_split import CheckpointError
from llama_split.checkpoint import EMBEDDING, FINAL_NORM, Checkpoint, GgufCheckpoint, open_checkpoint
from llama_split.checkpoint.gguf_file import GgufFile
from tests.support.checkpoints import CPU, as_gguf, assert_equal_to, refusal
from tests.support.llamas import Small, random_llama

UNREADABLE = Kind.Q8_1


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"tie_word_embeddings": True}, id="grouped-tied"),
        pytest.param({"num_key_value_heads": 4}, id="ungrouped-untied"),
        pytest.param({"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}, id="biased"),
    ],
)
def test_a_gguf_file_is_the_model_that_it_was_made_of(overrides: dict[str, Any], tmp_path: Path) -> None:
    """Names, row order of query and key, biases, configuration and fingerprint survive llama.cpp's conversion."""
    model = random_llama(**overrides)
    model.save_pretrained(tmp_path / "directory")
    directory = open_checkpoint(str(tmp_path / "directory"))
    file = open_checkpoint(str(as_gguf(model, tmp_path / "model.gguf")))
    assert isinstance(file, GgufCheckpoint)
    assert_equal_to(file, model)
    assert file.geometry == directory.geometry
    assert file.fingerprint() == directory.fingerprint()
    for field in ("attention_bias", "mlp_bias", "tie_word_embeddings", "max_position_embeddings", "head_dim"):
        assert getattr(file.config, field) == getattr(directory.config, field), field


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 500, 1500, 0.5, 0.999])
def test_a_truncated_gguf_file_is_refused(plain: Small, tmp_path: Path, keep: float) -> None:
    """Wherever a GGUF file was cut off, opening it finds out."""
    file = as_gguf(plain.unsplit, tmp_path / "model.gguf")
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert str(file) in refusal(file)


@pytest.mark.parametrize("head", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03"])
def test_garbage_is_no_gguf_file(tmp_path: Path, head: bytes) -> None:
    """Other bytes are refused, with or without a GGUF file's first bytes."""
    file = tmp_path / "model.gguf"
    file.write_bytes(head + bytes(range(256)) * 4)
    assert str(file) in refusal(file)


def test_a_gguf_file_of_another_architecture_is_refused_by_its_name(plain: Small, tmp_path: Path) -> None:
    """GGUF holds all kinds of models; only Llama's arithmetic is split."""
    text = refusal(as_gguf(plain.unsplit, tmp_path / "model.gguf", architecture="qwen2"))
    assert "qwen2" in text
    assert "Llama" in text


def test_several_gguf_files_must_be_chosen_from(plain: Small, tmp_path: Path) -> None:
    """A directory with two GGUF files is ambiguous; naming one is the remedy, and a wrong name is reported."""
    for name in ("a.gguf", "b.gguf"):
        as_gguf(plain.unsplit, tmp_path / name)
    assert "a.gguf" in refusal(tmp_path)
    assert "c.gguf" in refusal(tmp_path, gguf_file="c.gguf")
    assert open_checkpoint(str(tmp_path), gguf_file="b.gguf").path == tmp_path / "b.gguf"


def test_a_directory_with_one_gguf_file_is_that_file(plain: Small, tmp_path: Path) -> None:
    """The directory's only model need not be named."""
    assert open_checkpoint(str(as_gguf(plain.unsplit, tmp_path / "model.gguf").parent)).path == tmp_path / "model.gguf"


def test_the_demo_models_configuration_is_the_one_that_transformers_reads(
    smollm2_checkpoint: Checkpoint, unsplit_smollm2: LlamaForCausalLM
) -> None:
    """Every field of the configuration that transformers makes of the GGUF file, but for its own bookkeeping."""
    mine = smollm2_checkpoint.config.to_dict()
    theirs = unsplit_smollm2.config.to_dict()
    bookkeeping = {
        "_name_or_path",
        "_model_name_or_path",
        "quantization_config",
        "dtype",
        "transformers_version",
        "architectures",
    }
    compared = (set(mine) | set(theirs)) - bookkeeping
    assert {key: mine.get(key) for key in compared} == {key: theirs.get(key) for key in compared}


def test_the_demo_models_tensors_are_those_that_transformers_reads(
    smollm2_checkpoint: Checkpoint, unsplit_smollm2: LlamaForCausalLM
) -> None:
    """Bit for bit, after undoing quantisation and row order, in the first, a middle and the last layer."""
    state = unsplit_smollm2.state_dict()
    layers = tuple(f"model.layers.{index}." for index in (0, 13, 29))
    names = [EMBEDDING, FINAL_NORM, *(name for name in state if name.startswith(layers))]
    assert len(names) == 2 + 3 * 9
    for name in names:
        assert torch.equal(smollm2_checkpoint.load([name], torch.float32, CPU)[name], state[name]), name


def can_undo(kind: Kind) -> bool:
    """Whether the gguf package can dequantise this type."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


READABLE = [kind for kind in Kind if can_undo(kind)]


def test_the_gguf_package_undoes_the_usual_kinds() -> None:
    """The list that the next test goes through isn't empty by accident."""
    usual = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}
    assert usual <= {kind.name for kind in READABLE}
    assert UNREADABLE not in READABLE


@pytest.fixture(scope="module")
def wide() -> LlamaForCausalLM:
    """A model whose rows hold whole blocks of every kind."""
    return random_llama(hidden_size=512, intermediate_size=512, num_hidden_layers=1, vocab_size=300)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_quantisation_that_the_gguf_package_undoes_is_read(
    kind: Kind, wide: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix of any kind, read in several blocks, is bit for bit what the package makes of it at once."""
    monkeypatch.setattr(llama_split.checkpoint.base, "BLOCK_NUMBERS", 7 * 512)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60 are finite scales in every kind.
    data = np.random.default_rng(int(kind)).integers(0, 60, (512, 512 // block * block_bytes), np.uint8)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)

    checkpoint = open_checkpoint(str(as_gguf(wide, tmp_path / "model.gguf", more=add, leave_out="blk.0.ffn_up")))
    name = "model.layers.0.mlp.up_proj.weight"
    expected = torch.from_numpy(gguf.dequantize(data, kind).reshape(512, 512))
    assert torch.isfinite(expected).all()
    assert expected.unique().numel() > 2
    assert torch.equal(checkpoint.load([name], torch.float32, CPU)[name], expected)
    assert torch.equal(checkpoint.load([name], torch.bfloat16, CPU)[name], expected.to(torch.bfloat16))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_quantised_query_and_key_keep_transformers_row_order(kind: Kind, tmp_path: Path) -> None:
    """Whole quantised rows are put in order: every matrix is the model's, but for the quantisation's rounding."""
    model = random_llama()
    checkpoint = open_checkpoint(str(as_gguf(model, tmp_path / "model.gguf", kind=kind)))
    for name, expected in model.state_dict().items():
        if expected.dim() == 2:
            rounded = torch.from_numpy(
                gguf.dequantize(gguf.quantize(expected.numpy(), kind), kind).reshape(expected.shape)
            )
            assert torch.equal(checkpoint.read(name), rounded), name


def test_a_quantisation_that_can_not_be_undone_is_refused_with_those_that_can(tmp_path: Path) -> None:
    """The error names the tensor, its type, and the types that could be read."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[UNREADABLE]

    def add(writer: gguf.GGUFWriter) -> None:
        data = np.zeros((96, 64 // block * block_bytes), np.uint8)
        writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=UNREADABLE)

    text = refusal(as_gguf(random_llama(), tmp_path / "model.gguf", more=add, leave_out="blk.0.ffn_up"))
    assert re.search(r"layers\.0\.mlp\.up_proj.*Q8_1.*Q4_K", text)


def test_a_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    """Opening a file allocates nothing per word: neither its text nor its score."""
    words = 50_000

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list([f"word{index}" for index in range(words)])
        writer.add_token_scores([0.5] * words)
        writer.add_eos_token_id(77)

    file = as_gguf(random_llama(), tmp_path / "model.gguf", more=add)
    tracemalloc.start()
    try:
        fields = GgufFile(file).fields
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert fields["tokenizer.ggml.eos_token_id"] == 77
    assert peak < words


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda writer: writer.add_expert_count(8), "mixture of experts"),
        (lambda writer: writer.add_key_length(8), "key_length"),
        (lambda writer: writer.add_array("llama.attention.sizes", [[1], [2]]), "arrays of arrays"),
    ],
    ids=["experts", "partly rotated heads", "nested arrays"],
)
def test_a_llama_of_another_make_is_refused(add: Callable[[gguf.GGUFWriter], None], said: str, tmp_path: Path) -> None:
    """The architecture's name alone doesn't make a model a dense Llama."""
    assert said in refusal(as_gguf(random_llama(), tmp_path / "model.gguf", more=add))


def test_layers_of_different_sizes_are_refused(tmp_path: Path) -> None:
    """A size given as a list, one per layer, is not replaced by the default."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_array("llama.attention.key_length", [16, 16, 16])

    assert "key_length for each layer" in refusal(as_gguf(random_llama(), tmp_path / "model.gguf", more=add))


def test_any_changed_byte_of_a_header_opens_or_is_refused(plain: Small, tmp_path: Path) -> None:
    """Whatever a damaged header says, the result is a CheckpointError or a model, quickly."""
    file = as_gguf(plain.unsplit, tmp_path / "model.gguf")
    data = file.read_bytes()
    refused = 0
    with file.open("r+b", buffering=0) as damaged:
        for position in range(0, 2000, 3):
            os.pwrite(damaged.fileno(), bytes([data[position] ^ 0xFF]), position)
            try:
                open_checkpoint(str(file))
            except CheckpointError:
                refused += 1
            os.pwrite(damaged.fileno(), data[position : position + 1], position)
    assert refused > 100
