"""Fixtures of the integration tests: processes that serve all of them, and bare sockets."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from shmtransport.diagnostics import measure
from tests.support import cuda_driver
from tests.support.children import Child, Mother
from tests.support.cuda import Gpus
from tests.support.helpers import Spawn
from tests.support.process import ROOT
from tests.support.strangers import Stranger


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory, mother: Mother) -> Iterator[str]:
    """The address of a server in a process of its own, shared by these tests."""
    address = f"ipc://{tmp_path_factory.mktemp('server')}/server.ipc"
    process = Child(mother, ROOT / "tests/support/processes/server.py", address)
    process.wait_until_ready()
    yield address
    process.end()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for CUDA's driver."""
    pytest.importorskip("cuda.core", reason="needs cuda-core: the extra [cuda]")
    if cuda_driver.compiler() is None:
        pytest.skip("needs a C compiler for the stand-in of CUDA's driver")
    return cuda_driver.build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def gpus(spawn: Spawn, address: str, library: Path) -> Gpus:
    """Servers and clients with a GPU, which is the stand-in."""
    return Gpus(spawn, address, library)


@pytest.fixture
def stranger(address: str) -> Iterator[Callable[[], Stranger]]:
    """Make bare sockets that are connected to the test's server."""
    made: list[Stranger] = []

    def make() -> Stranger:
        made.append(Stranger(address))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def nothing_unhandled(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test if an event loop or an executor was left with an unhandled exception."""
    yield
    gc.collect()
    assert not [record for record in caplog.get_records("call") if record.name in ("asyncio", "concurrent.futures")]


@pytest.fixture
def fake_server(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A bare ROUTER socket where a server should be."""
    context = zmq.Context()
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    router.linger = 1000
    router.bind(address)
    yield router
    router.close()
    context.term()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure just long enough to have figures."""
    monkeypatch.setattr(measure, "_ROUND_TRIP_SECONDS", 0.005)
    monkeypatch.setattr(measure, "_SIZE_SECONDS", 0.002)
