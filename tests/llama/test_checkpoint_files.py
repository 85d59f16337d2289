"""Stand-ins in place of a model's files are refused before they are opened; links are followed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_split import CheckpointError
from llama_split.checkpoint import open_checkpoint
from llama_split.checkpoint.synthetic import RandomCheckpoint
from tests.support.checkpoints import as_gguf, changed, refusal
from tests.support.llamas import Small, random_llama

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 988097824\n"
FILES = ("config.json", SINGLE, "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def complete(small: Small, directory: Path) -> Path:
    """A copy of a model with a tokenizer and all that may lie beside it."""
    changed(small, directory, lambda _tensors: None)
    RandomCheckpoint("tinyllama-1.1b").tokenizer().save_pretrained(directory)
    return directory


def use(directory: Path) -> None:
    """Read everything that either side reads before it loads."""
    checkpoint = open_checkpoint(str(directory))
    checkpoint.tokenizer()
    checkpoint.generation_config()
    checkpoint.fingerprint()


def one_line_about(directory: Path, name: str) -> str:
    """The one-line refusal of the model, which names this file."""
    with pytest.raises(CheckpointError) as caught:
        use(directory)
    text = str(caught.value)
    assert name in text
    assert "\n" not in text
    return text


def test_a_complete_directory_is_used(plain: Small, tmp_path: Path) -> None:
    """The directory that the other tests damage is valid to begin with."""
    use(complete(plain, tmp_path))
    assert all((tmp_path / name).is_file() for name in FILES)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # a socket's path is short
        listener.bind(path.name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [os.mkfifo, make_socket], ids=["fifo", "socket"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(
    plain: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], object]
) -> None:
    """Opening a FIFO would block for as long as it has no writer."""
    monkeypatch.chdir(tmp_path)
    complete(plain, tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    one_line_about(tmp_path, name)


@pytest.mark.parametrize("name", ["config.json", SINGLE, "generation_config.json"])
def test_a_directory_in_place_of_a_file_is_refused(plain: Small, tmp_path: Path, name: str) -> None:
    """It is not treated as a missing optional file."""
    complete(plain, tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    one_line_about(tmp_path, name)


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_fifo_is_refused(plain: Small, tmp_path: Path, name: str) -> None:
    """What a link leads to counts."""
    complete(plain, tmp_path / "model")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to("../fifo")
    one_line_about(tmp_path / "model", name)


@pytest.mark.parametrize("name", FILES)
def test_a_git_lfs_pointer_is_called_by_its_name(plain: Small, tmp_path: Path, name: str) -> None:
    """A clone without Git LFS has small texts in place of large files; the error gives the remedy."""
    complete(plain, tmp_path)
    (tmp_path / name).write_text(POINTER)
    assert "git lfs pull" in one_line_about(tmp_path, name)


@pytest.mark.parametrize("pattern", ["model-00002-of-*.safetensors", INDEX])
def test_a_git_lfs_pointer_among_shards_is_called_by_its_name(plain: Small, tmp_path: Path, pattern: str) -> None:
    """One large file of several may be missing."""
    plain.unsplit.save_pretrained(tmp_path, max_shard_size="120KB")
    (file,) = tmp_path.glob(pattern)
    file.write_text(POINTER)
    assert f"{file} is a Git LFS pointer" in refusal(tmp_path)


def test_stand_ins_for_a_gguf_file_are_refused(tmp_path: Path) -> None:
    """The same for the only file of a model."""
    (tmp_path / "pointer.gguf").write_text(POINTER)
    assert "git lfs pull" in refusal(tmp_path / "pointer.gguf")
    os.mkfifo(tmp_path / "fifo.gguf")
    assert "no regular file" in refusal(tmp_path / "fifo.gguf")
    assert "no regular file" in refusal(tmp_path, gguf_file="fifo.gguf")


def index(directory: Path, weight_map: object) -> Path:
    (directory / SINGLE).unlink(missing_ok=True)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/hostname", "a/../../model.safetensors", "..", "/"])
def test_a_shard_outside_of_the_directory_is_refused_by_its_name(plain: Small, tmp_path: Path, shard: str) -> None:
    """An index may only name files of its own directory; the name alone decides, whether or not the file exists."""
    changed(plain, tmp_path, lambda _tensors: None)
    model = tmp_path / "model"
    shutil.copytree(plain.path, model)
    assert shard in refusal(index(model, dict.fromkeys(plain.unsplit.state_dict(), shard)))


@pytest.mark.parametrize(
    "weight_map", [{}, [], None, {"a": 3}, {"a": None}, {"a": ""}, {"a": "."}, {"a": "\0"}, {"a": "x" * 5000}]
)
def test_an_index_that_names_no_files_is_refused(plain: Small, tmp_path: Path, weight_map: object) -> None:
    """An empty one as well."""
    shutil.copytree(plain.path, tmp_path, dirs_exist_ok=True)
    assert str(tmp_path) in refusal(index(tmp_path, weight_map))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
def test_brackets_without_end_are_refused(plain: Small, tmp_path: Path, name: str) -> None:
    """JSON nested deeper than the parser goes."""
    complete(plain, tmp_path)
    if name == INDEX:
        (tmp_path / SINGLE).unlink()
    (tmp_path / name).write_text("[" * 100_000)
    one_line_about(tmp_path, name if name != "tokenizer_config.json" else "tokenizer")


def test_a_hubs_cache_is_made_of_links_and_is_read(plain: Small, tmp_path: Path) -> None:
    """Links out of the directory are followed: all files of a model in a cache are such links."""
    complete(plain, tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    use(snapshot)
    assert open_checkpoint(str(snapshot)).fingerprint() == open_checkpoint(str(plain.path)).fingerprint()


def test_a_link_to_nothing_is_refused(plain: Small, tmp_path: Path) -> None:
    """A cache that was cleaned in part."""
    complete(plain, tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to("../gone")
    one_line_about(tmp_path, SINGLE)


def test_one_part_of_a_split_gguf_file_is_called_by_its_number(tmp_path: Path) -> None:
    """The error gives the remedy; the first part alone would lack layers, the others have no configuration."""
    for number in (0, 1):
        file = as_gguf(
            random_llama(),
            tmp_path / f"model-0000{number + 1}-of-00002.gguf",
            more=lambda writer, number=number: (
                writer.add_uint16("split.no", number),
                writer.add_uint16("split.count", 2),
            ),
        )
        text = refusal(file)
        assert f"part {number + 1} of 2" in text
        assert "--merge" in text
