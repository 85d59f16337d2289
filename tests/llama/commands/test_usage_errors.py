"""Mistakes on the command line: one line, exit code 2, no traceback, no process, no segment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Command, is_one_line_error

pytestmark = pytest.mark.timeout(150)


def test_a_wrong_model_path_is_one_line(command: Command) -> None:
    """A path that doesn't exist; the command downloads nothing."""
    done = command("generate", "--prompt", "x", "--model", "/no/such/model")
    assert is_one_line_error(done), done
    assert "/no/such/model" in done.err


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "empty", "no_weights", "broken_weights", "broken_config", "text"])
def test_what_is_no_llama_is_one_line(command: Command, tiny: Path, tmp_path: Path, kind: str) -> None:
    """Another model, a directory without one, files that are damaged: the error says which."""
    model = tmp_path / "model"
    model.mkdir()
    if kind in ("gpt2", "qwen2"):
        (model / "config.json").write_text(json.dumps({"model_type": kind}))
        shutil.copy(tiny / "model.safetensors", model)
    elif kind == "no_weights":
        shutil.copy(tiny / "config.json", model)
    elif kind == "broken_weights":
        shutil.copy(tiny / "config.json", model)
        (model / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:5000])
    elif kind == "broken_config":
        (model / "config.json").write_text("{")
        shutil.copy(tiny / "model.safetensors", model)
    elif kind == "text":
        model = tmp_path / "notes.txt"
        model.write_text("not a model")
    done = command("generate", "--prompt", "x", "--model", str(model))
    assert is_one_line_error(done), done
    assert str(model) in done.err
    if kind in ("gpt2", "qwen2"):
        assert f"'{kind}'" in done.err
        assert "only Llama" in done.err


def test_a_gguf_file_that_is_none_is_one_line(command: Command, tmp_path: Path) -> None:
    """A file of the right name and the wrong contents."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF but not really" * 10)
    done = command("generate", "--prompt", "x", "--model", str(model))
    assert is_one_line_error(done), done
    assert str(model) in done.err


def test_no_worker_at_the_address_is_one_line(command: Command, tiny: Path, tmp_path: Path) -> None:
    """It names the address and says what to do."""
    address = f"ipc://{tmp_path}/nobody.ipc"
    done = command(
        *("generate", "--prompt", "w5", "--no-chat", "--model", str(tiny), "--worker", address),
        *("--connect-timeout-s", "0.2"),
    )
    assert is_one_line_error(done), done
    assert address in done.err
    assert "within 0.2 s (there is no" in done.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--dtype", "int8"), "int8 is not supported; choose one of float32, bfloat16, float16"),
        (("--mode", "magic"), "'magic' is not supported; choose one of"),
        (("--worker", "nonsense"), "'nonsense' is neither ipc:///absolute/path nor tcp://host:port"),
        (("--device", "cuda:99"), "device 'cuda:99' is not there"),
        (("--pipeline", "9"), "pipeline 9 is not supported; choose 1 to 8 chunks"),
        (("--pipeline", "2", "--mode", "stack"), "in mode stack nothing could overlap with the one worker"),
    ],
    ids=["dtype", "mode", "worker", "device", "pipeline", "pipeline in stack"],
)
def test_a_bad_option_is_one_line_that_says_what_would_do(
    command: Command, tiny: Path, options: tuple[str, ...], reason: str
) -> None:
    """The same where it is the worker that rejects it."""
    done = command("generate", "--prompt", "w5", "--no-chat", "--model", str(tiny), *options)
    assert is_one_line_error(done), done
    assert reason in done.err.splitlines()[-1]


@pytest.mark.parametrize("words", [32, 33, 500])
def test_a_prompt_longer_than_the_models_positions_is_one_line(
    command: Command, worker: str, tiny: Path, words: int
) -> None:
    """It gives the prompt's tokens, the model's positions, and by how many tokens to shorten it."""
    prompt = " ".join(["w7"] * words)
    done = command("generate", "--prompt", prompt, "--no-chat", "--model", str(tiny), "--worker", worker)
    assert is_one_line_error(done), done
    assert f"has {words} tokens; the model has 32 positions" in done.err
    assert f"shorten the prompt by {words - 31} tokens" in done.err


def test_an_empty_prompt_is_one_line(command: Command, worker: str, tiny: Path) -> None:
    """There is nothing to continue."""
    done = command("generate", "--prompt", "", "--no-chat", "--model", str(tiny), "--worker", worker)
    assert is_one_line_error(done), done
    assert "prompt is empty" in done.err


@pytest.mark.parametrize("mode", ["fused", "layer"])
def test_an_arena_too_small_is_one_line(command: Command, worker: str, tiny: Path, mode: str) -> None:
    """An arena that can't hold a single row of logits; the error has the figures and the remedy."""
    done = command(
        *("generate", "--prompt", "w5 w6", "--no-chat", "--model", str(tiny), "--worker", worker),
        *("--mode", mode, "--arena-bytes", "100"),
    )
    assert is_one_line_error(done), done
    assert "arena" in done.err


def test_an_arena_larger_than_the_machine_is_one_line(command: Command, worker: str, tiny: Path) -> None:
    """The worker refuses it with its figures."""
    done = command(
        *("generate", "--prompt", "w5 w6", "--no-chat", "--model", str(tiny), "--worker", worker),
        *("--arena-bytes", str(1 << 50)),
    )
    assert is_one_line_error(done), done
    assert "MiB" in done.err


def test_a_worker_of_another_dtype_is_one_line(command: Command, worker: str, tiny: Path) -> None:
    """Both dtypes are named."""
    done = command(
        *("generate", "--prompt", "w5", "--no-chat", "--model", str(tiny), "--worker", worker), LLAMA_DTYPE="bfloat16"
    )
    assert is_one_line_error(done), done
    assert "computes in float32, and this side needs bfloat16: start it with --dtype bfloat16" in done.err
    assert "LLAMA_DTYPE=bfloat16 (from the environment)" in done.err


def test_a_worker_needs_an_address_that_is_free(command: Command, worker: str, tiny: Path) -> None:
    """A missing address, and one that is taken: the worker that has it goes on."""
    done = command("worker", "--model", str(tiny))
    assert is_one_line_error(done), done
    assert "LLAMA_IPC_PATH" in done.err
    done = command("worker", "--model", str(tiny), "--bind", worker)
    assert is_one_line_error(done), done
    assert "already listening" in done.err
