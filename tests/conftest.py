"""Fixtures for all tests: own addresses, servers in a thread or a process, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import zmq

from llama_split.launcher import temporary_directory
from shmtransport import Server
from shmtransport.bell import is_owned, remove_if_dead
from shmtransport.liveness import holder
from shmtransport.zmq_context import close_socket, open_socket

ROOT = Path(__file__).parent.parent
_OURS_IN_SHM = "shmtransport-"
_OUR_BELLS = "sem.shmtransport-bell-"
_started: set[int] = {os.getpid()}
"""The processes of this run, dead or alive."""

# All temporary files of this run, its children's too, go here: other runs on the machine are none of its business.
_TEMPORARY = tempfile.mkdtemp(prefix="shmt-", dir=temporary_directory(room=80))
os.environ["TMPDIR"] = tempfile.tempdir = _TEMPORARY


def pytest_sessionfinish() -> None:
    """Remove the run's own temporary directory."""
    shutil.rmtree(_TEMPORARY, ignore_errors=True)


def _bells(pids: set[int]) -> list[str]:
    """The files of these processes' bells."""
    prefixes = {f"{_OUR_BELLS}{pid}" for pid in pids}
    return [name for name in os.listdir("/dev/shm") if name.rpartition("-")[0] in prefixes]


def _traces() -> set[str]:
    """Segments that no other living process holds, temporary files, and bells of this process and of its dead ones."""
    theirs = ("pytest-of-", "torchinductor_")  # made by pytest for tmp_path, and by torch when it is imported
    traces = {name for name in os.listdir(_TEMPORARY) if not name.startswith(theirs)}
    for name in os.listdir("/dev/shm"):
        if name.startswith(_OURS_IN_SHM):
            with contextlib.suppress(OSError):
                segment = os.open(f"/dev/shm/{name}", os.O_RDONLY | os.O_NONBLOCK)  # it may be another test's pipe
                if holder(segment) is None:
                    traces.add(name)
                os.close(segment)
    traces.update(_bells({os.getpid()}))
    for name in _bells(_started):
        with contextlib.suppress(FileNotFoundError):
            if not is_owned(f"/dev/shm/{name}"):
                traces.add(name)
    return traces


@pytest.fixture(autouse=True, scope="session")
def zmq_has_started() -> None:
    """Open what this process's ZeroMQ context keeps open, so that tests may compare descriptors and threads."""
    close_socket(open_socket(zmq.DEALER), 0)
    time.sleep(0.2)  # libzmq's own thread closes it


@pytest.fixture(autouse=True, scope="session")
def collect_quickly() -> None:
    """Take what the imports have made out of every later collection: they cost seconds in all otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Every test leaves /dev/shm and the temporary directory as it found them."""
    before = _traces()
    yield
    gc.collect()
    deadline = time.monotonic() + 10.0  # a segment may be that of another run, whose test removes it
    while (left := _traces() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


@pytest.fixture
def directory() -> Iterator[Path]:
    """A private directory with a path short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="shmt-test-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def address(directory: Path) -> str:
    """A ZeroMQ address of this test's own."""
    return f"ipc://{directory}/server.ipc"


@pytest.fixture
def serve(address: str) -> Iterator[Callable[..., Server]]:
    """Start a server of this process in a thread: ``serve(name=handler, …)``; options of Server go in ``options``."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(options: dict[str, int] | None = None, **handlers: Callable[..., object]) -> Server:
        server = Server(address, **(options or {}))
        for name, handler in handlers.items():
            server.register(name, handler)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.stop()
        thread.join(10.0)
        assert not thread.is_alive(), "the server did not stop"
        server.close()


class Process:
    """A Python child process that prints "ready" once it is."""

    def __init__(self, script: str | Path, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
        )
        self.remember()

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}

    def remember(self) -> None:
        """It has started."""
        _started.add(self.pid)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> IO[str]:
        """What it prints, errors too."""
        assert self.popen.stdout is not None
        return self.popen.stdout

    def wait_until_ready(self) -> None:
        line = self.output.readline()
        assert line.startswith("ready"), f"the process said {line!r}, not ready"

    def readline(self) -> str:
        return self.output.readline().rstrip("\n")

    def wait(self, timeout_s: float = 30.0) -> int:
        return self.popen.wait(timeout_s)

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.forget(self.popen.wait())

    def forget(self, code: int) -> None:
        """It has ended with this exit code. A killed one may leave its bell, for the next server to remove."""
        self.output.close()
        if code == -signal.SIGKILL:
            for name in _bells({self.pid}):
                remove_if_dead(f"/dev/shm/{name}")


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    """Start scripts as processes of their own; what still runs at the test's end is killed."""
    started: list[Process] = []

    def start(script: str | Path, *arguments: str, ready: bool = True) -> Process:
        process = Process(script, *arguments)
        started.append(process)
        if ready:
            process.wait_until_ready()
        return process

    yield start
    for process in started:
        process.end()
