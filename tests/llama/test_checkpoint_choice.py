"""Which of a directory's files and tensors are used, and in which dtype: the same as in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llama_split import CheckpointError, SplitLlamaForCausalLM
from llama_split.checkpoint import EMBEDDING, LM_HEAD, open_checkpoint
from tests.support.checkpoints import CPU, Tensors, changed, edit_config, refusal
from tests.support.llamas import Small, random_llama, worker_in_thread
from tests.support.prompts import prompt

INDEX = "model.safetensors.index.json"


def assert_used_as_by_transformers(directory: Path) -> None:
    """Every parameter that a worker and a trusted side load is the unsplit model's."""
    unsplit = LlamaForCausalLM.from_pretrained(directory)
    checkpoint = open_checkpoint(str(directory))
    state = unsplit.state_dict()
    loaded = checkpoint.load(checkpoint.parameters(), torch.float32, CPU)
    assert torch.equal(loaded[checkpoint.lm_head_name()], state[LM_HEAD].float())
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name].float()), name
    assert checkpoint.dtype == unsplit.dtype


def test_an_output_matrix_of_its_own_is_used_though_the_configuration_ties_it(
    save_small: Callable[..., Small], mode: str
) -> None:
    """The files win over tie_word_embeddings, in every split."""
    small = save_small(seed=11)
    edit_config(small.path, tie_word_embeddings=True)
    assert_used_as_by_transformers(small.path)
    with (
        worker_in_thread(small.path) as worker,
        SplitLlamaForCausalLM.from_pretrained(small.path, worker=worker.address, mode=mode) as split,
        torch.no_grad(),
    ):
        torch.testing.assert_close(split(prompt(9)).logits, small.unsplit(prompt(9)).logits, atol=1e-4, rtol=1e-4)


def test_a_tied_matrix_is_one_model_whether_stored_once_or_twice(
    save_small: Callable[..., Small], tmp_path: Path
) -> None:
    """A copy of the embedding under the output matrix's name changes neither results nor fingerprint."""
    small = save_small(seed=12, tie_word_embeddings=True)
    twice = changed(small, tmp_path, lambda tensors: tensors.update({LM_HEAD: tensors[EMBEDDING].clone()}))
    assert_used_as_by_transformers(twice)
    assert open_checkpoint(str(twice)).fingerprint() == open_checkpoint(str(small.path)).fingerprint()


def test_a_tied_embedding_may_be_stored_as_the_output_matrix(save_small: Callable[..., Small], tmp_path: Path) -> None:
    """Either name works for the one matrix."""
    small = save_small(seed=12, tie_word_embeddings=True)
    assert_used_as_by_transformers(
        changed(small, tmp_path, lambda tensors: tensors.update({LM_HEAD: tensors.pop(EMBEDDING)}))
    )


def test_an_untied_model_needs_its_output_matrix(plain: Small, tmp_path: Path) -> None:
    """The embedding does not stand in for it."""
    assert LM_HEAD in refusal(changed(plain, tmp_path, lambda tensors: tensors.pop(LM_HEAD)))


def test_the_single_file_is_used_where_an_index_lies_beside_it(plain: Small, tmp_path: Path) -> None:
    """Shards of another model beside model.safetensors are not read."""
    random_llama(seed=13).save_pretrained(tmp_path, max_shard_size="40KB")
    changed(plain, tmp_path, lambda _tensors: None)
    assert (tmp_path / INDEX).exists()
    assert_used_as_by_transformers(tmp_path)


def test_of_two_shards_with_one_tensor_the_later_is_used(plain: Small, tmp_path: Path) -> None:
    """The shards' own contents count, in the order of their names; the index only lists the shards."""
    plain.unsplit.save_pretrained(tmp_path, max_shard_size="40KB")
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    save_file({**load_file(last), EMBEDDING: torch.ones(160, 64)}, last, {"format": "pt"})
    assert_used_as_by_transformers(tmp_path)
    assert float(open_checkpoint(str(tmp_path)).read(EMBEDDING).sum()) == 160 * 64


@pytest.mark.parametrize("named", ["other.safetensors", "other.safetensors.index.json"])
def test_a_file_that_the_configuration_names_is_used(plain: Small, tmp_path: Path, named: str) -> None:
    """``transformers_weights`` takes precedence over model.safetensors."""
    changed(plain, tmp_path, lambda _tensors: None)
    other = random_llama(seed=14).state_dict()
    save_file(other, tmp_path / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    (tmp_path / "other.safetensors.index.json").write_text(json.dumps(index))
    edit_config(tmp_path, transformers_weights=named)
    assert_used_as_by_transformers(tmp_path)


@pytest.mark.parametrize("renamed", [lambda name: name.removeprefix("model."), lambda name: f"model.{name}"])
def test_names_without_the_prefix_and_with_it_twice_are_known(
    plain: Small, tmp_path: Path, renamed: Callable[[str], str]
) -> None:
    """What transformers renames on loading, we rename too; other names are missing for both."""

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name == LM_HEAD or renamed(name)[:6] != "model."]:
            tensors[renamed(name)] = tensors.pop(name)

    assert_used_as_by_transformers(changed(plain, tmp_path, rename))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_dtype_in_the_configuration_the_files_tell(
    plain: Small, tmp_path: Path, stored: torch.dtype, address: str
) -> None:
    """The first floating-point tensor's dtype counts; ``dtype="auto"`` asks for it, ``torch_dtype`` is another name."""

    def convert(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    changed(plain, tmp_path, convert)
    edit_config(tmp_path, dtype=..., torch_dtype=...)
    assert_used_as_by_transformers(tmp_path)
    with worker_in_thread(tmp_path, dtype=stored) as worker:
        for chosen in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"torch_dtype": stored}):
            with SplitLlamaForCausalLM.from_pretrained(tmp_path, worker=worker.address, **chosen) as split:
                assert split.dtype == stored


def test_a_checkpoint_that_is_opened_once_keeps_its_own_dtype(plain: Small, plain_worker: Any) -> None:
    """A model made from it in another dtype does not change what the next one gets by default."""
    checkpoint = open_checkpoint(str(plain.path))
    with pytest.raises(Exception, match="start it with --dtype"):
        SplitLlamaForCausalLM.from_pretrained(checkpoint, worker=plain_worker.address, dtype="bfloat16")
    with SplitLlamaForCausalLM.from_pretrained(checkpoint, worker=plain_worker.address) as split:
        assert split.dtype == torch.float32


def test_an_adapter_beside_the_weights_is_refused(plain: Small, tmp_path: Path) -> None:
    """Where peft is installed transformers applies an adapter, so we must not ignore it silently."""
    changed(plain, tmp_path, lambda _tensors: None)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge" in refusal(tmp_path)


def test_a_pytorch_file_alone_is_refused_and_beside_safetensors_not_read(plain: Small, tmp_path: Path) -> None:
    """Nothing is ever unpickled."""
    changed(plain, tmp_path, lambda _tensors: None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    assert_used_as_by_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="save_pretrained"):
        open_checkpoint(str(tmp_path))
