"""Checkpoints: what is read equals what transformers holds, and what can't be read is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig

from llama_split import CheckpointError
from llama_split.checkpoint import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    Checkpoint,
    GgufCheckpoint,
    SafetensorsCheckpoint,
    open_checkpoint,
)
from llama_split.operations import Mode
from llama_split.settings import demo_model
from llama_split.trusted.model import TrustedPart
from llama_split.worker.kernels import Weights

from .conftest import Small, random_llama

CPU = torch.device("cpu")
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_gguf(model: LlamaForCausalLM, path: Path, architecture: str = "llama") -> Path:
    """Write a model as llama.cpp's converter does, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_bos_token_id(1)
    for name, tensor in model.state_dict().items():
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, index, part = stem.split(".", 3)
            stem = f"blk.{index}.{GGUF_NAMES[part]}"
        else:
            stem = GGUF_NAMES[stem]
        writer.add_tensor(f"{stem}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def needed(checkpoint: Checkpoint) -> set[str]:
    """Every parameter of the model by transformers' names; a tied output matrix is the embedding."""
    with torch.device("meta"):
        names = set(LlamaForCausalLM(checkpoint.config).state_dict())
    return names - {LM_HEAD} if checkpoint.config.tie_word_embeddings else names


def assert_equal_to(checkpoint: Checkpoint, model: LlamaForCausalLM) -> None:
    state = model.state_dict()
    loaded = checkpoint.load(needed(checkpoint), torch.float32, CPU)
    assert set(loaded) == needed(checkpoint)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.is_contiguous()
        assert torch.equal(checkpoint.read_first_row(name).reshape(-1), checkpoint.read(name)[:1].reshape(-1)) or (
            ".q_proj." in name or ".k_proj." in name
        )


def refusal(path: Path | str, **options: Any) -> str:
    """The one line that says why a model can't be opened."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_tensor_of_a_directory_equals_the_models(small: Small) -> None:
    """What transformers saved is what is read, for tied and untied embeddings, grouped heads and biases."""
    assert_equal_to(open_checkpoint(str(small.path)), small.unsplit)


def test_a_sharded_directory_is_the_same_model(small: Small, tmp_path: Path) -> None:
    """The number of files changes neither the tensors nor the fingerprint."""
    small.unsplit.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = open_checkpoint(str(tmp_path))
    assert_equal_to(sharded, small.unsplit)
    assert sharded.fingerprint() == open_checkpoint(str(small.path)).fingerprint()


def test_other_weights_have_another_fingerprint(plain: Small, save_small: Callable[..., Small]) -> None:
    """Two models of one shape are told apart."""
    other = save_small(seed=6)
    assert open_checkpoint(str(plain.path)).fingerprint() != open_checkpoint(str(other.path)).fingerprint()


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


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    """The demo model's file, opened once: that takes seconds."""
    return open_checkpoint(str(demo_model()))


def test_the_demo_models_configuration_is_the_one_that_transformers_reads(
    demo: Checkpoint, unsplit_smollm2: LlamaForCausalLM
) -> None:
    """Every field of the configuration that transformers makes of the GGUF file, but for its own bookkeeping."""
    mine = demo.config.to_dict()
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
    demo: Checkpoint, unsplit_smollm2: LlamaForCausalLM
) -> None:
    """Bit for bit, after undoing quantisation and row order, in the first, a middle and the last layer."""
    state = unsplit_smollm2.state_dict()
    layers = tuple(f"model.layers.{index}." for index in (0, 13, 29))
    names = [EMBEDDING, FINAL_NORM, *(name for name in state if name.startswith(layers))]
    assert len(names) == 2 + 3 * 9
    for name in names:
        assert torch.equal(demo.load([name], torch.float32, CPU)[name], state[name]), name


class Recording(SafetensorsCheckpoint):
    """Remembers which tensors were read in full."""

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        super().__init__(path, config)
        self.full: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.full.append(name)
        return super().read(name)


@pytest.mark.parametrize("mode", list(Mode))
def test_the_trusted_side_reads_the_embedding_and_norms_only(small: Small, mode: Mode) -> None:
    """No weight matrix of a layer is read where only the embedding and norms are needed, each tensor once."""
    checkpoint = Recording(small.path, open_checkpoint(str(small.path)).config)
    checkpoint.load(TrustedPart.weight_names(checkpoint.config, mode), torch.float32, CPU)
    norms = {Mode.FUSED: 2 * checkpoint.geometry.layers + 1, Mode.LAYER: 1, Mode.STACK: 0}[mode]
    assert len(checkpoint.full) == len(set(checkpoint.full)) == 1 + norms
    assert all(name == EMBEDDING or "norm" in name for name in checkpoint.full)


def test_the_worker_reads_each_of_its_tensors_once_and_the_embedding_only_if_tied(small: Small) -> None:
    """The worker needs all but the embedding, and that too if it is the output matrix."""
    checkpoint = Recording(small.path, open_checkpoint(str(small.path)).config)
    Weights(checkpoint, torch.float32, CPU)
    tied = checkpoint.config.tie_word_embeddings
    assert len(checkpoint.full) == len(set(checkpoint.full))
    assert set(checkpoint.full) == needed(checkpoint) - (set() if tied else {EMBEDDING})


@pytest.mark.parametrize("name", [EMBEDDING, LM_HEAD, "model.layers.1.self_attn.k_proj.weight", FINAL_NORM])
def test_a_missing_tensor_is_named(plain: Small, tmp_path: Path, name: str) -> None:
    """A directory that lacks a tensor is refused by the tensor's name, whichever side needs it."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    def open_and_load() -> None:
        checkpoint = open_checkpoint(str(tmp_path))
        checkpoint.load(TrustedPart.weight_names(checkpoint.config, Mode.FUSED), torch.float32, CPU)
        Weights(checkpoint, torch.float32, CPU)
        checkpoint.fingerprint()

    with pytest.raises(CheckpointError, match=name) as caught:
        open_and_load()
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "name", [EMBEDDING, "model.layers.0.mlp.down_proj.weight", "model.layers.2.input_layernorm.weight"]
)
def test_a_tensor_of_another_shape_than_the_configuration_is_refused(plain: Small, tmp_path: Path, name: str) -> None:
    """A config.json that belongs to other weights is a checkpoint error, not a wrong product later."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    def open_and_load() -> None:
        checkpoint = open_checkpoint(str(tmp_path))
        checkpoint.load(TrustedPart.weight_names(checkpoint.config, Mode.FUSED), torch.float32, CPU)
        Weights(checkpoint, torch.float32, CPU)

    with pytest.raises(CheckpointError) as caught:
        open_and_load()
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    """A path that does not exist is named."""
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")


def test_a_hub_id_that_no_hub_gives_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network an uncached hub id is an error of one line, not a traceback of the hub's client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nobody/nothing" in refusal("nobody/nothing")


def test_a_directory_without_a_model_is_said(tmp_path: Path) -> None:
    """A directory with neither config.json nor GGUF file is asked about."""
    text = refusal(tmp_path)
    assert str(tmp_path) in text
    assert "config.json" in text


def test_a_configuration_without_weights_says_what_to_do(tmp_path: Path) -> None:
    """config.json alone is not a model."""
    LlamaConfig().save_pretrained(tmp_path)
    assert "save_pretrained" in refusal(tmp_path)


def test_an_unreadable_configuration_is_said(plain: Small, tmp_path: Path) -> None:
    """A broken config.json is named."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    for text in ("{", "[]", "null", '{"model_type": "no such model"}', '{"model_type": "llama", "hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(text)
        assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("config", [GPT2Config(n_layer=1), MistralConfig(num_hidden_layers=1)], ids=["gpt2", "mistral"])
def test_a_model_that_is_no_llama_is_refused_by_its_type(plain: Small, tmp_path: Path, config: Any) -> None:
    """Another architecture would compute silently wrong: it is refused, and the supported one is named."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    config.save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert config.model_type in text
    assert "Llama" in text


@pytest.mark.parametrize("keep", [0, 4, 200, 20_000])
def test_truncated_safetensors_are_refused(plain: Small, tmp_path: Path, keep: int) -> None:
    """A download that stopped early is found when the model is opened."""
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
    """An index that is no index is named, not tripped over."""
    plain.unsplit.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 500, 1500, 0.5, 0.999])
def test_a_truncated_gguf_file_is_refused(plain: Small, tmp_path: Path, keep: float) -> None:
    """Wherever a GGUF file was cut off, that is found when it is opened."""
    file = as_gguf(plain.unsplit, tmp_path / "model.gguf")
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert str(file) in refusal(file)


@pytest.mark.parametrize("head", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03"])
def test_garbage_is_no_gguf_file(tmp_path: Path, head: bytes) -> None:
    """Bytes of something else are refused, with or without a GGUF file's first bytes."""
    file = tmp_path / "model.gguf"
    file.write_bytes(head + bytes(range(256)) * 4)
    assert str(file) in refusal(file)


def test_a_gguf_file_of_another_architecture_is_refused_by_its_name(plain: Small, tmp_path: Path) -> None:
    """GGUF holds all kinds of models; only Llama's arithmetic is split."""
    text = refusal(as_gguf(plain.unsplit, tmp_path / "model.gguf", architecture="qwen2"))
    assert "qwen2" in text
    assert "Llama" in text


def test_several_gguf_files_must_be_chosen_from(plain: Small, tmp_path: Path) -> None:
    """A directory of two GGUF files is ambiguous; naming one is the remedy, and a wrong name is said."""
    for name in ("a.gguf", "b.gguf"):
        as_gguf(plain.unsplit, tmp_path / name)
    assert "a.gguf" in refusal(tmp_path)
    assert "c.gguf" in refusal(tmp_path, gguf_file="c.gguf")
    assert open_checkpoint(str(tmp_path), gguf_file="b.gguf").path == tmp_path / "b.gguf"


def test_a_directory_with_one_gguf_file_is_that_file(plain: Small, tmp_path: Path) -> None:
    """The directory's only model need not be named."""
    assert open_checkpoint(str(as_gguf(plain.unsplit, tmp_path / "model.gguf").parent)).path == tmp_path / "model.gguf"


def test_a_file_of_another_kind_is_refused(plain: Small) -> None:
    """A single safetensors file has no configuration beside it by right."""
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
    """The file that names the end tokens can't be ignored silently, nor end in a traceback."""
    small = save_small()
    (small.path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_checkpoint(str(small.path)).generation_config()


def test_a_missing_tokenizer_is_one_line(save_small: Callable[..., Small]) -> None:
    """A model without tokenizer files names what is missing."""
    with pytest.raises(CheckpointError, match="the tokenizer of") as caught:
        open_checkpoint(str(save_small().path)).tokenizer()
    assert "\n" not in str(caught.value)


def test_an_unknown_activation_is_one_line(save_small: Callable[..., Small]) -> None:
    """A configuration that asks for arithmetic nobody knows is refused at once."""
    small = save_small()
    config = json.loads((small.path / "config.json").read_text())
    (small.path / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such_act"}))
    with pytest.raises(CheckpointError, match="no_such_act"):
        open_checkpoint(str(small.path))
