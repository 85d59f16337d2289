"""Commands that are interrupted or killed while they generate: they leave nothing behind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import Running, workers_of
from tests.support.helpers import eventually

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def start_generating(running: Callable[..., Running], long: Path) -> Callable[..., Running]:
    """Start a command, by default with its own worker; return once it prints what it generates."""
    common = ("--prompt", "w5", "--no-chat", "--model", str(long), "--max-new-tokens", "90000")

    def start(*options: str) -> Running:
        process = running("generate", *common, *options)
        assert process.output.read(1) == "w"
        return process

    return start


def test_ctrl_c_during_a_generation_ends_it_in_order(start_generating: Callable[..., Running]) -> None:
    """Exit code 130, one word, no traceback, and its worker ends with it."""
    process = start_generating()
    assert len(workers_of(process.pid)) == 1
    process.signal(signal.SIGINT)
    code, _, err = process.finish()
    assert code == 130, err
    assert err.strip() == "interrupted"
    assert workers_of(process.pid) == []


def test_a_killed_generation_leaves_no_worker_and_no_file(start_generating: Callable[..., Running]) -> None:
    """The kernel tells the worker, which exits in order and removes its socket and the directory made for it."""
    process = start_generating()
    assert len(workers_of(process.pid)) == 1
    process.signal(signal.SIGKILL)
    process.finish()
    assert eventually(lambda: not workers_of(process.pid), 10.0)


def test_a_killed_worker_is_one_line_if_it_is_not_to_be_connected_to_again(
    start_generating: Callable[..., Running], running: Callable[..., Running], long: Path, address: str
) -> None:
    """The generation ends with an error that names the lost worker, not with a time-out."""
    worker = running("worker", "--bind", address, "--model", str(long))
    worker.wait_until_ready()
    process = start_generating("--worker", address, "--no-reconnect")
    worker.signal(signal.SIGKILL)
    code, _, err = process.finish()
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "has ended" in err
    assert "Traceback" not in err
