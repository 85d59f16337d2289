"""Models that can't be opened: each is refused with one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig

from llama_split import CheckpointError
from llama_split.checkpoint import open_checkpoint
from tests.support.checkpoints import refusal
from tests.support.llamas import Small


def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    """The error names the path that does not exist."""
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")


def test_a_hub_id_that_no_hub_gives_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, an uncached hub id is a one-line error, not a traceback of the hub's client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nobody/nothing" in refusal("nobody/nothing")


def test_a_directory_without_a_model_is_said(tmp_path: Path) -> None:
    """The error for a directory with neither config.json nor GGUF file names the directory and what it lacks."""
    text = refusal(tmp_path)
    assert str(tmp_path) in text
    assert "config.json" in text


def test_a_configuration_without_weights_says_what_to_do(tmp_path: Path) -> None:
    """config.json alone is not a model."""
    LlamaConfig().save_pretrained(tmp_path)
    assert "save_pretrained" in refusal(tmp_path)


def test_an_unreadable_configuration_is_said(plain: Small, tmp_path: Path) -> None:
    """The error names the broken config.json."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    for text in ("{", "[]", "null", '{"model_type": "no such model"}', '{"model_type": "llama", "hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(text)
        assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("config", [GPT2Config(n_layer=1), MistralConfig(num_hidden_layers=1)], ids=["gpt2", "mistral"])
def test_a_model_that_is_no_llama_is_refused_by_its_type(plain: Small, tmp_path: Path, config: Any) -> None:
    """Another architecture would silently compute wrong results: the error names it and the supported one."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    config.save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert config.model_type in text
    assert "Llama" in text


@pytest.mark.parametrize("keep", [0, 4, 200, 20_000])
def test_truncated_safetensors_are_refused(plain: Small, tmp_path: Path, keep: int) -> None:
    """Opening the model finds a download that stopped early."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(tmp_path) in refusal(tmp_path)


def test_a_missing_shard_is_refused(plain: Small, tmp_path: Path) -> None:
    """All files that the index names must be there."""
    plain.unsplit.save_pretrained(tmp_path, max_shard_size="40KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_shard_index_is_refused(plain: Small, tmp_path: Path, text: str) -> None:
    """The error names a broken index."""
    plain.unsplit.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert str(tmp_path) in refusal(tmp_path)


def test_a_file_of_another_kind_is_refused(plain: Small) -> None:
    """A single safetensors file is refused, even with a configuration beside it."""
    assert "model.safetensors" in refusal(plain.path / "model.safetensors")


def test_a_models_own_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that brings Python code is refused without asking; none of it runs."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}, "architectures": ["Mine"]})
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")

    def never(*_arguments: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", never)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_broken_generation_config_is_one_line(save_small: Callable[..., Small]) -> None:
    """The file that names the end tokens must not be ignored silently, nor end in a traceback."""
    small = save_small()
    (small.path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_checkpoint(str(small.path)).generation_config()


def test_a_missing_tokenizer_is_one_line(save_small: Callable[..., Small]) -> None:
    """The error for a model without tokenizer files names what is missing."""
    with pytest.raises(CheckpointError, match="the tokenizer of") as caught:
        open_checkpoint(str(save_small().path)).tokenizer()
    assert "\n" not in str(caught.value)


def test_an_unknown_activation_is_one_line(save_small: Callable[..., Small]) -> None:
    """A configuration with an unknown activation function is refused at once."""
    small = save_small()
    config = json.loads((small.path / "config.json").read_text())
    (small.path / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such_act"}))
    with pytest.raises(CheckpointError, match="no_such_act"):
        open_checkpoint(str(small.path))


def test_a_tensor_that_only_the_index_names_is_refused(plain: Small, tmp_path: Path) -> None:
    """An index that promises more than its files hold is found when the model is opened, by the tensor's name."""
    plain.unsplit.save_pretrained(tmp_path, max_shard_size="40KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = sorted(set(index["weight_map"].values()))[0]
    file.write_text(json.dumps(index))
    assert "model.layers.7.mlp.up_proj.weight" in refusal(tmp_path)
