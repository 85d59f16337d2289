"""The command line as its users see it: its output, and settings from the environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Command, environment, is_one_line_error, run

pytestmark = pytest.mark.timeout(150)

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


# What works


def test_help_is_quick_and_lists_the_commands() -> None:
    """Neither torch nor transformers is imported for it."""
    done = run("--help")
    assert done.code == 0
    for name in ("generate", "chat", "worker", "info"):
        assert f" {name} " in done.out
    loaded = subprocess.run(
        [sys.executable, "-c", "import llama_split.__main__, sys; print('torch' in sys.modules)"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout == "False\n"


def test_the_demo_answers_and_reports_its_transport() -> None:
    """Without any setting it starts its own worker, answers a question correctly, and reports its transport."""
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


def test_a_pipelined_prompt_has_the_same_answer(command: Command, worker: str, long: Path) -> None:
    """Its parts are in flight together, as the statistics show."""
    prompt = " ".join(f"w{number}" for number in range(40))
    common = ("generate", "--prompt", prompt, "--no-chat", "--json", "--max-new-tokens", "8", "--model", str(long))
    answers = []
    for options in ((), ("--pipeline", "2")):
        done = command(*common, "--worker", worker, *options)
        assert done.code == 0, done.err
        answers.append(json.loads(done.out))
    whole, parts = answers
    assert parts["token_ids"] == whole["token_ids"]
    assert (whole["statistics"]["in_flight_peak"], parts["statistics"]["in_flight_peak"]) == (1, 2)


@pytest.mark.parametrize("prompt", ["w5 w6 w7", "w1999"])
def test_every_mode_generates_the_same_tokens(command: Command, worker: str, tiny: Path, prompt: str) -> None:
    """Exactly the requested number, as one JSON object alone on standard output, in every split."""
    common = ("--model", str(tiny), "--worker", worker, "--no-chat", "--json", "--max-new-tokens", "8")
    answers = {}
    for mode in ("fused", "layer", "stack"):
        done = command("generate", "--prompt", prompt, "--mode", mode, *common)
        assert (done.code, done.err) == (0, "")
        answers[mode] = json.loads(done.out)
        assert answers[mode]["mode"] == mode
        assert len(answers[mode]["token_ids"]) == 8
        assert answers[mode]["transport"]["address"] == worker
    assert answers["fused"]["token_ids"] == answers["layer"]["token_ids"] == answers["stack"]["token_ids"]
    assert answers["fused"]["statistics"]["calls"] > answers["layer"]["statistics"]["calls"]


def test_without_json_the_text_and_a_table_are_printed(command: Command, worker: str, tiny: Path) -> None:
    """The text streams to standard output, then the transport's figures with units."""
    done = command("generate", "--prompt", "w5", "--model", str(tiny), "--worker", worker, "--no-chat")
    assert done.code == 0
    assert done.out.split()[0].startswith("w")
    for row in ("calls", "serialise", "control sent", "ms/call", "KiB"):
        assert row in done.out


def test_a_generation_ends_where_the_models_positions_do(command: Command, worker: str, tiny: Path) -> None:
    """The command doesn't ask the model for more tokens than fit: 4 + 28 = 32 positions."""
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
    """The notice leaves out the overridden variable."""
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
