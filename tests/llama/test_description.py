"""What ``llama-split info`` reads without torch is what opening the model says; else it opens the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_split.checkpoint import open_checkpoint
from llama_split.checkpoint.demo import demo_model
from llama_split.checkpoint.description import Description, describe, quick_description
from llama_split.checkpoint.shapes import SHAPES
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.errors import CheckpointError
from tests.support.checkpoints import as_gguf, changed, edit_config
from tests.support.commands import environment
from tests.support.llamas import Small, random_llama


def opened(path: Path) -> Description:
    checkpoint = open_checkpoint(path)
    return Description(checkpoint.path, checkpoint.outline, checkpoint.config.max_position_embeddings)


def test_every_kind_of_model_is_described_as_it_is_opened(small: Small) -> None:
    """Biases, tied matrices, wide heads; where something is unusual, by opening it."""
    assert describe(str(small.path), None) == opened(small.path)


@pytest.mark.parametrize(
    "variant", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24}]
)
@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_a_plain_directory_needs_no_transformers(variant: dict[str, Any], shard_size: str, tmp_path: Path) -> None:
    """In one file or several."""
    random_llama(**variant).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert quick_description(tmp_path) == opened(tmp_path)


@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"head_dim": 24}])
def test_a_plain_gguf_file_needs_no_transformers(variant: dict[str, Any], tmp_path: Path) -> None:
    """The demo's among them."""
    path = as_gguf(random_llama(**variant), tmp_path / "model.gguf")
    assert quick_description(path) == opened(path)
    assert quick_description(demo_model()) == opened(demo_model())


@pytest.mark.parametrize("name", SHAPES)
def test_random_weights_need_no_weights(name: str) -> None:
    """Only the shape's sizes."""
    checkpoint = RandomCheckpoint(name, 3)
    assert describe(name, 3) == Description(
        checkpoint.path, checkpoint.outline, checkpoint.config.max_position_embeddings
    )
    with pytest.raises(CheckpointError, match="there is no shape"):
        describe("nonsense", 3)


LLAMA3 = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}


@pytest.mark.parametrize(
    ("changes", "is_plain"),
    [
        ({"num_key_value_heads": ...}, False),
        ({"num_key_value_heads": 3}, False),
        ({"head_dim": ...}, True),
        ({"hidden_size": 2.0}, False),
        ({"hidden_act": "gelu"}, False),
        ({"hidden_act": "nonsense"}, False),
        ({"rms_norm_eps": -1.0}, False),
        ({"pad_token_id": 1000}, False),
        ({"dtype": "int8"}, False),
        ({"model_type": "mistral"}, False),
        ({"quantization_config": {"quant_method": "awq"}}, False),
        ({"num_labels": 10**12}, False),
        ({"use_cache": "yes"}, False),
        ({"max_position_embeddings": 77}, True),
        ({"rope_parameters": None, "rope_theta": 5e5}, True),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}, True),
        ({"rope_parameters": ..., "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}, True),
        ({"rope_parameters": LLAMA3}, False),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "factor": 0.0}}, False),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "many"}}, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_is_in_doubt_is_opened(plain: Small, tmp_path: Path, changes: dict[str, Any], is_plain: bool) -> None:
    """So that the errors are those of the other commands, and nothing is described that they refuse."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, **changes)
    quick = quick_description(tmp_path)
    assert (quick is not None) is is_plain
    if quick is not None:
        assert quick == opened(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
        lambda tensors: tensors.update({"lm_head.lora_A.weight": torch.zeros(3)}),
    ],
    ids=["missing", "of another shape", "quantised", "an adapter's"],
)
def test_tensors_that_do_not_fit_are_left_to_the_error(
    plain: Small, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """One line that names the tensor."""
    path = changed(plain, tmp_path, change)
    assert quick_description(path) is None
    with pytest.raises(CheckpointError):
        describe(str(path), None)


def test_other_files_are_left_to_the_error(plain: Small, tmp_path: Path) -> None:
    """An adapter, a damaged file, an index that leads elsewhere, names without their prefix, and nothing at all."""
    for name in ("adapter", "damaged", "elsewhere", "unprefixed"):
        shutil.copytree(plain.path, tmp_path / name)
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    weights = tmp_path / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "elsewhere/model.safetensors").rename(tmp_path / "elsewhere/other.safetensors")
    index = {"weight_map": {"model.norm.weight": "../adapter/model.safetensors"}}
    (tmp_path / "elsewhere/model.safetensors.index.json").write_text(json.dumps(index))
    weights = tmp_path / "unprefixed/model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(weights).items()}, weights)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    for name in ("adapter", "damaged", "elsewhere", "unprefixed", "broken.gguf", "missing"):
        assert quick_description(tmp_path / name) is None, name


@pytest.mark.parametrize("options", [(), ("--model", "llama-3.2-1b", "--random-weights")])
def test_info_imports_neither_torch_nor_transformers(options: tuple[str, ...]) -> None:
    """Which takes many seconds; for the demo's model, too."""
    script = (
        "import sys, llama_split.__main__\n"
        "try:\n    llama_split.__main__.main()\n"
        "finally:\n    print({'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "info", *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "set()\n")
