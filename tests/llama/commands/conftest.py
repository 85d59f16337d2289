"""Fixtures for the command line's tests: commands that need not import anything, small models, a worker for one."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.children import Child, Mother
from tests.support.commands import FORKED, Command, Finished, Running, run_forked


@pytest.fixture(scope="session")
def command(llama_mother: Mother) -> Command:
    """Run the command in a process that has imported all: ``command(*arguments, said="", **variables)``."""

    def command(*arguments: str, said: str = "", **variables: str) -> Finished:
        return run_forked(llama_mother, arguments, said, variables)

    return command


@pytest.fixture(scope="session")
def long(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with enough positions that a generation lasts as long as a test needs."""
    path = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(tiny, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    return path


@pytest.fixture(scope="session")
def talking(long: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template: "w1" and "w2" around what the user says, "w3" and "w2" around answers."""
    path = tmp_path_factory.mktemp("models") / "talking"
    shutil.copytree(long, path)
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ {'system': 'w4', 'user': 'w1', 'assistant': 'w3'}[message.role] }} "
        "{{ message.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    return path


@pytest.fixture(scope="session")
def worker(llama_mother: Mother, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a worker that serves the tiny model in float32."""
    address = f"ipc://{tmp_path_factory.mktemp('worker')}/worker.ipc"
    process = Child(llama_mother, FORKED, "worker", "--bind", address, "--model", str(tiny))
    process.wait_until_ready()
    yield address
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    process.end()


@pytest.fixture
def running(llama_mother: Mother) -> Iterator[Callable[..., Running]]:
    """Start commands in processes that have imported all; what still runs at the test's end is killed."""
    started: list[Running] = []

    def start(*arguments: str) -> Running:
        started.append(Running(llama_mother, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.end()
