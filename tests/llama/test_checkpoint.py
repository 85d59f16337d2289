"""Checkpoints: the tensors equal those of transformers, and each side reads only what it needs, once."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import llama_split.checkpoint.base
from llama_split import CheckpointError, SplitLlamaForCausalLM, WorkerMismatch
from llama_split.boundary.operations import Mode
from llama_split.checkpoint import EMBEDDING, FINAL_NORM, LM_HEAD, SafetensorsCheckpoint, open_checkpoint
from llama_split.checkpoint.base import SAMPLED_NUMBERS, SAMPLED_ROWS
from llama_split.trusted.part import TrustedPart
from llama_split.worker.weights import Weights
from tests.support.checkpoints import CPU, assert_equal_to, changed, needed
from tests.support.llamas import Small, worker_in_thread


def test_every_tensor_of_a_directory_equals_the_models(small: Small) -> None:
    """Tied and untied embeddings, grouped heads and biases are read exactly as transformers saved them."""
    assert_equal_to(open_checkpoint(str(small.path)), small.unsplit)


def test_a_sharded_directory_is_the_same_model(small: Small, tmp_path: Path) -> None:
    """The number of files changes neither the tensors nor the fingerprint."""
    small.unsplit.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = open_checkpoint(str(tmp_path))
    assert_equal_to(sharded, small.unsplit)
    assert sharded.fingerprint() == open_checkpoint(str(small.path)).fingerprint()


def test_other_weights_have_another_fingerprint(plain: Small, save_small: Callable[..., Small]) -> None:
    """Two models of one shape have different fingerprints."""
    other = save_small(seed=6)
    assert open_checkpoint(str(plain.path)).fingerprint() != open_checkpoint(str(other.path)).fingerprint()


class Recording(SafetensorsCheckpoint):
    """Remembers which rows were read."""

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        super().__init__(path, config)
        self.read_rows: dict[str, list[int]] = {}

    def rows(self, name: str, start: int, stop: int, step: int = 1) -> torch.Tensor:
        self.read_rows.setdefault(name, []).extend(range(start, stop, step))
        return super().rows(name, start, stop, step)

    def assert_each_row_was_read_once(self) -> None:
        for name, rows in self.read_rows.items():
            assert rows == list(range(self.stored_shape(name)[0])), name


@pytest.fixture(params=[1, 1000, 1 << 21])
def block_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of less than a row, of some rows, and of more than a tensor."""
    numbers: int = request.param
    monkeypatch.setattr(llama_split.checkpoint.base, "BLOCK_NUMBERS", numbers)
    return numbers


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.usefixtures("block_numbers")
def test_the_trusted_side_reads_the_embedding_and_norms_only(small: Small, mode: Mode) -> None:
    """No weight matrix of a layer is read where only the embedding and norms are needed, each row once."""
    checkpoint = Recording(small.path, open_checkpoint(str(small.path)).config)
    names = TrustedPart.weight_names(checkpoint.config, mode)
    checkpoint.load(names, torch.float32, CPU)
    assert set(checkpoint.read_rows) == set(names)
    assert all(name == EMBEDDING or "norm" in name for name in names)
    checkpoint.assert_each_row_was_read_once()


@pytest.mark.usefixtures("block_numbers")
def test_the_worker_reads_each_of_its_tensors_once_and_the_embedding_only_if_tied(small: Small) -> None:
    """The worker needs all but the embedding, and that too if it is the output matrix."""
    checkpoint = Recording(small.path, open_checkpoint(str(small.path)).config)
    Weights(checkpoint, torch.float32, CPU)
    tied = checkpoint.config.tie_word_embeddings
    assert set(checkpoint.read_rows) == needed(checkpoint) - (set() if tied else {EMBEDDING})
    checkpoint.assert_each_row_was_read_once()


def test_a_fingerprint_reads_some_rows_of_every_matrix(plain: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing models needs no second reading of all weights, and covers every matrix."""
    monkeypatch.setattr(llama_split.checkpoint.base, "SAMPLED_NUMBERS", 1)
    checkpoint = Recording(plain.path, open_checkpoint(str(plain.path)).config)
    checkpoint.fingerprint()
    assert set(checkpoint.read_rows) == needed(checkpoint)
    for name, rows in checkpoint.read_rows.items():
        count = checkpoint.shape(name)[0]
        if "norm" in name:
            assert rows == list(range(count))
        else:
            assert 8 < len(rows) <= SAMPLED_ROWS
            assert rows[-1] == count - 1
            assert len({after - before for before, after in itertools.pairwise(rows)}) == 1


@pytest.mark.parametrize("sampled_numbers", [1, SAMPLED_NUMBERS])
def test_a_change_to_any_one_matrix_changes_the_fingerprint(
    save_small: Callable[..., Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled_numbers: int
) -> None:
    """Every matrix and bias counts: a merged adapter of rank one is seen, whichever matrix it was merged into."""
    monkeypatch.setattr(llama_split.checkpoint.base, "SAMPLED_NUMBERS", sampled_numbers)
    small = save_small(seed=8, attention_bias=True, mlp_bias=True, num_hidden_layers=2)
    expected = open_checkpoint(str(small.path)).fingerprint()
    generator = torch.Generator().manual_seed(1)
    for name in sorted(needed(open_checkpoint(str(small.path)))):

        def merge(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            rows, *width = tensors[name].shape
            change = torch.randn(rows, 1, generator=generator) @ torch.randn(1, *(width or [1]), generator=generator)
            tensors[name] += 1e-3 * change.view(tensors[name].shape)

        other = open_checkpoint(str(changed(small, tmp_path, merge)))
        assert other.fingerprint() != expected, name


def test_a_worker_with_an_adapter_merged_is_refused(plain: Small, tmp_path: Path) -> None:
    """A worker that differs in its query matrices alone serves another model."""

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.001

    with (
        worker_in_thread(changed(plain, tmp_path, merge)) as worker,
        pytest.raises(WorkerMismatch, match="other weights"),
    ):
        SplitLlamaForCausalLM.from_pretrained(plain.path, worker=worker.address)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("block_numbers")
def test_groups_are_stacked_by_rows(save_small: Callable[..., Small], dtype: torch.dtype) -> None:
    """A group's matrices are stacked row on row, and its biases end to end, as ``torch.cat`` would."""
    small = save_small(attention_bias=True)
    state = small.unsplit.state_dict()
    stems = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    groups = {kind: [f"{stem}.{kind}" for stem in stems] for kind in ("weight", "bias")}
    groups["alone"] = [FINAL_NORM]
    seen: list[tuple[int, int]] = []
    loaded = open_checkpoint(str(small.path)).load_stacked(groups, dtype, CPU, lambda *at: seen.append(at))
    assert list(loaded) == list(groups)
    for key, names in groups.items():
        assert torch.equal(loaded[key], torch.cat([state[name] for name in names]).to(dtype)), key
        assert loaded[key].is_contiguous()
    assert seen == [(count, 7) for count in range(1, 8)]


def test_a_group_of_unequal_widths_is_refused(plain: Small) -> None:
    """Unequal widths are the caller's mistake; so is an empty group."""
    checkpoint = open_checkpoint(str(plain.path))
    for group in ((EMBEDDING, "model.layers.0.mlp.down_proj.weight"), (EMBEDDING, FINAL_NORM), ()):
        with pytest.raises(ValueError, match="one width"):
            checkpoint.load_stacked({"key": group}, torch.float32, CPU)


def test_nothing_is_read_before_all_is_found_right(plain: Small) -> None:
    """A missing last tensor is reported at once, not after minutes of loading."""
    checkpoint = Recording(plain.path, open_checkpoint(str(plain.path)).config)
    with pytest.raises(CheckpointError, match=r"model\.layers\.9"):
        checkpoint.load([EMBEDDING, "model.layers.9.mlp.up_proj.weight"], torch.float32, CPU)
    assert not checkpoint.read_rows


def test_loaded_tensors_are_no_views_of_the_file(save_small: Callable[..., Small]) -> None:
    """A file that is overwritten in place later leaves the loaded weights alone."""
    small = save_small()
    checkpoint = open_checkpoint(str(small.path))
    loaded = checkpoint.load([EMBEDDING], torch.float32, CPU)[EMBEDDING]
    with (small.path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(loaded, small.unsplit.state_dict()[EMBEDDING])


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
