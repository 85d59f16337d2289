"""The command line as its users meet it: output, exit codes, one-line errors, and nothing left behind.

Importing torch and transformers takes many seconds, so most commands here run in processes forked from one that has
imported them (``scripts/warm.py``); those that are killed or interrupted are started as a user would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(150)

LLAMA = [sys.executable, "-m", "llama_split"]
VOCABULARY = 2000  # a row of logits is 8000 bytes, more than the smallest arena
STATISTICS = {
    "calls",
    "call_seconds",
    "serialize_seconds",
    "deserialize_seconds",
    "tensor_bytes_sent",
    "tensor_bytes_received",
    "control_bytes_sent",
    "control_bytes_received",
    "bytes_copied",
}


class Finished(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """This process's, without variables that settings are taken from."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **extra}


def run(*arguments: str, **extra: str) -> Finished:
    """Run the command as a user would."""
    done = subprocess.run(
        [*LLAMA, *arguments], env=environment(**extra), capture_output=True, text=True, timeout=120, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


Command = Callable[..., Finished]


@pytest.fixture(scope="module")
def command(tiny: Path) -> Iterator[Command]:
    """Run the command in a process forked from a warm one: ``command(*arguments, **variables)``."""
    warm = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/scripts/warm.py"), str(tiny)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert warm.stdin is not None
    assert warm.stdout is not None
    assert warm.stdout.readline() == "ready\n"

    def command(*arguments: str, **variables: str) -> Finished:
        assert warm.stdin is not None
        assert warm.stdout is not None
        warm.stdin.write(json.dumps({"arguments": arguments, "environment": variables}) + "\n")
        warm.stdin.flush()
        return Finished(**json.loads(warm.stdout.readline()))

    yield command
    warm.stdin.close()
    warm.wait(10)
    warm.stdout.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama of 32 positions with a tokenizer of whole words: "w0" … "w1999"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)  # noqa: S106
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def long(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with so many positions that a generation lasts as long as a test wants it to."""
    path = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(tiny, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    return path


@pytest.fixture(scope="module")
def worker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a worker that serves the tiny model in float32."""
    address = f"ipc://{tmp_path_factory.mktemp('worker')}/worker.ipc"
    process = subprocess.Popen(
        [*LLAMA, "worker", "--bind", address, "--model", str(tiny)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()


def workers_of(process: int) -> list[int]:
    """The workers that a process has started for itself and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
                running = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except (OSError, ValueError):
                continue
            if running and b"--parent" in line and line[line.index(b"--parent") + 1] == str(process).encode():
                found.append(int(entry.name))
    return found


def has_none_within(condition: Callable[[], object], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not condition()


def is_one_line_error(done: Finished) -> bool:
    lines = done.err.strip().splitlines()
    return (
        done.code == 2
        and done.out == ""
        and "Traceback" not in done.err
        and lines[-1].startswith("error: ")
        and all("(from the environment)" in line for line in lines[:-1])
    )


# What works


def test_help_is_quick_and_lists_both_commands() -> None:
    """Neither torch nor transformers is imported for it."""
    done = run("--help")
    assert done.code == 0
    assert "generate" in done.out
    assert "worker" in done.out
    loaded = subprocess.run(
        [sys.executable, "-c", "import llama_split.__main__, sys; print('torch' in sys.modules)"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout == "False\n"


def test_the_demo_answers_and_reports_its_transport() -> None:
    """Without any setting it starts its own worker, answers a question right, and says how it got there."""
    done = run("generate", "--prompt", "What is the capital of France?", "--json", "--max-new-tokens", "8")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert "Paris" in answer["text"]
    assert answer.keys() >= {"text", "token_ids", "mode", "dtype", "transport", "statistics"}
    assert 1 <= len(answer["token_ids"]) <= 8
    assert (answer["mode"], answer["dtype"]) == ("fused", "float32")
    assert answer["transport"]["kind"] == "ipc"
    assert answer["transport"]["channel"] == "zmq"
    assert answer["transport"]["address"].startswith("ipc:///")
    assert answer["statistics"].keys() >= STATISTICS
    assert answer["statistics"]["calls"] > 100
    assert answer["statistics"]["control_bytes_sent"] < answer["statistics"]["tensor_bytes_sent"]


@pytest.mark.parametrize("prompt", ["w5 w6 w7", "w1999"])
def test_every_mode_generates_the_same_tokens(command: Command, worker: str, tiny: Path, prompt: str) -> None:
    """As many as were asked for, as one JSON object on standard output and nothing else, whatever the split."""
    common = ("--model", str(tiny), "--worker", worker, "--no-chat", "--json", "--max-new-tokens", "8")
    answers = {}
    for mode in ("fused", "layer"):
        done = command("generate", "--prompt", prompt, "--mode", mode, *common)
        assert (done.code, done.err) == (0, "")
        answers[mode] = json.loads(done.out)
        assert answers[mode]["mode"] == mode
        assert len(answers[mode]["token_ids"]) == 8
        assert answers[mode]["transport"]["address"] == worker
    assert answers["fused"]["token_ids"] == answers["layer"]["token_ids"]
    assert answers["fused"]["statistics"]["calls"] > answers["layer"]["statistics"]["calls"]


def test_without_json_the_text_and_a_table_are_printed(command: Command, worker: str, tiny: Path) -> None:
    """The text streams to standard output, then the transport's figures with units."""
    done = command("generate", "--prompt", "w5", "--model", str(tiny), "--worker", worker, "--no-chat")
    assert done.code == 0
    assert done.out.split()[0].startswith("w")
    for row in ("calls", "serialise", "control sent", "ms/call", "KiB"):
        assert row in done.out


def test_a_generation_ends_where_the_models_positions_do(command: Command, worker: str, tiny: Path) -> None:
    """More tokens than fit are not asked of the model: 4 + 28 = 32 positions."""
    done = command(
        *("generate", "--prompt", "w1 w2 w3 w4", "--model", str(tiny), "--worker", worker, "--no-chat", "--json"),
        *("--max-new-tokens", "1000"),
    )
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["token_ids"]) == 28


def test_a_model_without_chat_template_says_so_and_continues_plainly(command: Command, worker: str, tiny: Path) -> None:
    """One notice on standard error; standard output stays JSON."""
    done = command("generate", "--prompt", "w5", "--model", str(tiny), "--worker", worker, "--json")
    assert done.code == 0
    assert "no chat template" in done.err
    assert json.loads(done.out)["token_ids"]


# Settings from the environment


def test_a_setting_from_the_environment_is_honoured_and_reported(command: Command, worker: str, tiny: Path) -> None:
    """Each variable in force is named with its value and "environment": a stale one can't go unnoticed."""
    done = command(
        *("generate", "--prompt", "w5 w6", "--no-chat", "--json", "--max-new-tokens", "2"),
        LLAMA_MODEL_PATH=str(tiny),
        LLAMA_IPC_PATH=worker,
        LLAMA_DTYPE="float32",
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["transport"]["address"] == worker
    for variable, value in (("LLAMA_MODEL_PATH", str(tiny)), ("LLAMA_IPC_PATH", worker), ("LLAMA_DTYPE", "float32")):
        assert [line for line in done.err.splitlines() if f"{variable}={value}" in line and "environment" in line]


def test_an_option_outdoes_the_environment(command: Command, worker: str, tiny: Path) -> None:
    """What the option overrides is not in force and not reported."""
    done = command(
        *("generate", "--prompt", "w5", "--no-chat", "--json", "--max-new-tokens", "1", "--dtype", "float32"),
        *("--model", str(tiny), "--worker", worker),
        LLAMA_MODEL_PATH="/no/such/model",
        LLAMA_IPC_PATH="ipc:///no/such/worker",
        LLAMA_DTYPE="nonsense",
    )
    assert done.code == 0, done.err
    assert "LLAMA_" not in done.err


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("LLAMA_MODEL_PATH", "/no/such/model", "no model at '/no/such/model'"),
        ("LLAMA_DTYPE", "float7", "float7 is not supported"),
        ("LLAMA_IPC_PATH", "tcp://192.0.2.1:5555", "not on the loopback"),
    ],
)
def test_a_bad_setting_from_the_environment_is_an_error_that_names_its_source(
    command: Command, tiny: Path, variable: str, value: str, reason: str
) -> None:
    """First the notice that the variable is in force, then the one line of the error."""
    options = ["generate", "--prompt", "w5", "--no-chat"]
    if variable != "LLAMA_MODEL_PATH":
        options += ["--model", str(tiny)]
    done = command(*options, **{variable: value})
    assert is_one_line_error(done), done
    assert reason in done.err.splitlines()[-1]
    assert f"{variable}={value}" in done.err.splitlines()[0]
    assert "environment" in done.err.splitlines()[0]


# Mistakes: one line, exit code 2, no traceback, no process, no segment


def test_a_wrong_model_path_is_one_line(command: Command) -> None:
    """A path that isn't there; nothing is fetched from anywhere."""
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
    done = command("generate", "--prompt", "w5", "--no-chat", "--model", str(tiny), "--worker", address)
    assert is_one_line_error(done), done
    assert address in done.err
    assert "start one" in done.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--dtype", "int8"), "int8 is not supported; choose one of float32, bfloat16, float16"),
        (("--mode", "magic"), "'magic' is not supported; choose one of"),
        (("--worker", "nonsense"), "'nonsense' is neither ipc:///absolute/path nor tcp://host:port"),
        (("--device", "cuda:99"), "device 'cuda:99' is not there"),
    ],
    ids=["dtype", "mode", "worker", "device"],
)
def test_a_bad_option_is_one_line_that_says_what_would_do(
    command: Command, tiny: Path, options: tuple[str, ...], reason: str
) -> None:
    """Also where it is the worker that can't use it."""
    done = command("generate", "--prompt", "w5", "--no-chat", "--model", str(tiny), *options)
    assert is_one_line_error(done), done
    assert reason in done.err.splitlines()[-1]


@pytest.mark.parametrize("words", [32, 33, 500])
def test_a_prompt_longer_than_the_models_positions_is_one_line(
    command: Command, worker: str, tiny: Path, words: int
) -> None:
    """With how many tokens it has, how many positions there are, and by how much to shorten it."""
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
    """One that can't hold a single row of logits; the error has the figures and the remedy."""
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
    assert "float32, this side in bfloat16" in done.err
    assert "LLAMA_DTYPE=bfloat16 (from the environment)" in done.err


def test_a_worker_needs_an_address_that_is_free(command: Command, worker: str, tiny: Path) -> None:
    """None given, and one that is taken: the worker that is there goes on."""
    done = command("worker", "--model", str(tiny))
    assert is_one_line_error(done), done
    assert "LLAMA_IPC_PATH" in done.err
    done = command("worker", "--model", str(tiny), "--bind", worker)
    assert is_one_line_error(done), done
    assert "already listening" in done.err


# Ends


def start_generating(model: Path) -> subprocess.Popen[bytes]:
    """A command with its own worker that has begun to print what it generates."""
    process = subprocess.Popen(
        [*LLAMA, "generate", "--prompt", "w5", "--no-chat", "--model", str(model), "--max-new-tokens", "90000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"w"
    return process


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Its exit code and standard error."""
    _, err = process.communicate(timeout=30)
    return process.returncode, err.decode()


def test_ctrl_c_during_a_generation_ends_it_in_order(long: Path) -> None:
    """Exit code 130, one word, no traceback, and its worker ends with it."""
    process = start_generating(long)
    assert len(workers_of(process.pid)) == 1
    process.send_signal(signal.SIGINT)
    code, err = finish(process)
    assert code == 130, err
    assert err.strip() == "interrupted"
    assert workers_of(process.pid) == []


def test_a_killed_generation_leaves_no_worker_and_no_file(long: Path) -> None:
    """The kernel tells the worker, which ends in order and removes its socket and the directory made for it."""
    process = start_generating(long)
    assert len(workers_of(process.pid)) == 1
    process.kill()
    finish(process)
    assert has_none_within(lambda: workers_of(process.pid))


def test_a_killed_worker_is_one_line(long: Path) -> None:
    """The generation ends with an error that says so, not with a time-out."""
    process = start_generating(long)
    for worker in workers_of(process.pid):
        os.kill(worker, signal.SIGKILL)
    code, err = finish(process)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "has ended" in err
    assert "Traceback" not in err
