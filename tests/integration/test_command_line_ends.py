"""Commands that are interrupted or killed, started as a user would: they leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from .commands import LLAMA, environment, workers_of
from .helpers import eventually

pytestmark = pytest.mark.timeout(150)


def start_generating(model: Path, *options: str) -> subprocess.Popen[bytes]:
    """A command with its own worker that has begun to print what it generates."""
    common = ("--prompt", "w5", "--no-chat", "--model", str(model), "--max-new-tokens", "90000")
    process = subprocess.Popen(
        [*LLAMA, "generate", *common, *options],
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
    assert eventually(lambda: not workers_of(process.pid), 10.0)


def test_a_killed_worker_is_one_line_if_it_is_not_to_be_started_again(long: Path) -> None:
    """The generation ends with an error that says so, not with a time-out."""
    process = start_generating(long, "--no-reconnect")
    for worker in workers_of(process.pid):
        os.kill(worker, signal.SIGKILL)
    code, err = finish(process)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "has ended" in err
    assert "Traceback" not in err
