"""Fixtures for all tests: own addresses, servers in a thread or a process, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import zmq

from llama_split.placement.local import temporary_directory
from shmtransport import AsyncClient, Client, Server
from shmtransport.channels.zmq_context import close_socket, open_socket
from shmtransport.endpoints.options import DEFAULT_ARENA_BYTES
from shmtransport.memory.owner_lock import holder
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import MIB
from tests.support.children import Child, Mother
from tests.support.forked_workers import ForkedWorkers
from tests.support.private_memory import take_private_memory
from tests.support.process import Process

_OURS_IN_SHM = "shmtransport-"
_MOST_WORKERS = 6  # each imports torch, and starts processes of its own
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
# Each run and each worker of pytest-xdist has a /dev/shm of its own; a worker's was made before this is imported.
_IS_PRIVATE = bool(_WORKER) or take_private_memory()
# All temporary files of this run, its children's too, go here.
if _WORKER:
    _TEMPORARY = os.path.join(os.environ["TMPDIR"], _WORKER)
    os.mkdir(_TEMPORARY)
else:
    _TEMPORARY = tempfile.mkdtemp(prefix="shmt-", dir=temporary_directory(room=80))
os.environ["TMPDIR"] = tempfile.tempdir = _TEMPORARY

# How long an example takes tells of the machine, not of what is tested.
hypothesis.settings.register_profile("without_deadlines", deadline=None)
hypothesis.settings.load_profile("without_deadlines")

# Most tests move little, and to have the kernel zero two arenas of the default size takes a twentieth of a second.
_DEFAULTS = [client.__init__.__kwdefaults__ for client in (Client, AsyncClient)]
for _defaults in _DEFAULTS:
    _defaults["arena_bytes"] = 2 * MIB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """More than there are cores, since tests wait most of the time; none where they would see each other's segments."""
    return min(_MOST_WORKERS, 2 * len(os.sched_getaffinity(0)) + 1) if _IS_PRIVATE else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Have the workers forked, each with a /dev/shm of its own: to import everything takes each many seconds."""
    workers = ForkedWorkers(os.path.join(_TEMPORARY, "workers.sock"), config.args)
    config.add_cleanup(workers.close)
    for spec in specs:
        spec.python = workers.interpreter


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First what needs the demo model, so that one worker has it all: loading it takes many seconds.

    Tests on a cluster, which take minutes, run only where they are asked for.
    """
    if "cluster" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("cluster") is not None:
                item.add_marker(pytest.mark.skip(reason="starts a Ray cluster: `make test-cluster` runs it"))

    def needs_no_demo_model(item: pytest.Item) -> bool:
        names = getattr(item, "fixturenames", ())
        return not {"unsplit_smollm2", "smollm2_starting"} & set(names)

    items.sort(key=needs_no_demo_model)


def pytest_sessionfinish() -> None:
    """Remove the run's own temporary directory."""
    shutil.rmtree(_TEMPORARY, ignore_errors=True)


def _traces() -> set[str]:
    """Segments that no other living process holds, and temporary files."""
    theirs = ("pytest-of-", "torchinductor_")  # made by pytest for tmp_path, and by torch when it is imported
    traces = {name for name in os.listdir(_TEMPORARY) if not name.startswith(theirs)}
    for name in os.listdir("/dev/shm"):
        if name.startswith(_OURS_IN_SHM):
            with contextlib.suppress(OSError):
                segment = os.open(f"/dev/shm/{name}", os.O_RDONLY | os.O_NONBLOCK)  # it may be another test's pipe
                if holder(segment) is None:
                    traces.add(name)
                os.close(segment)
    return traces


@pytest.fixture(autouse=True, scope="session")
def zmq_has_started() -> None:
    """Open what this process's ZeroMQ context keeps open, so that tests may compare descriptors and threads."""
    close_socket(open_socket(zmq.DEALER), 0)
    time.sleep(0.2)  # libzmq's own thread closes it


@pytest.fixture(autouse=True, scope="module")
def collect_quickly() -> None:
    """Take what there is already out of the collections after each test: they cost minutes in all otherwise."""
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
def default_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this test have arenas as large as users' have, unless they say otherwise."""
    for defaults in _DEFAULTS:
        monkeypatch.setitem(defaults, "arena_bytes", DEFAULT_ARENA_BYTES)


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


@pytest.fixture(params=["zmq", "doorbell"])
def channel(request: pytest.FixtureRequest) -> ChannelKind:
    """Both kinds of channel, in turn."""
    kind: ChannelKind = request.param
    return kind


@pytest.fixture(scope="session")
def mother() -> Iterator[Mother]:
    """What the tests' processes are forked from."""
    mother = Mother.beside_us() or Mother.start()
    yield mother
    mother.end()


@pytest.fixture
def spawn(mother: Mother) -> Iterator[Callable[..., Process]]:
    """Start scripts as processes of their own, quickly; what still runs at the test's end is killed."""
    started: list[Process] = []

    def start(script: str | Path, *arguments: str, ready: bool = True) -> Process:
        started.append(Child(mother, script, *arguments))
        if ready:
            started[-1].wait_until_ready()
        return started[-1]

    yield start
    for process in started:
        process.end()
