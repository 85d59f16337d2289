"""Fixtures of the transport tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import shmtransport.core
from shmtransport.channels import doorbell, doorbell_server, relay
from tests.support.arenas import Pair
from tests.support.cores import CORES

_LONG_SLICE_S = 20.0  # far longer than any of these tests


@pytest.fixture(scope="session", params=CORES)
def core(request: pytest.FixtureRequest) -> ModuleType:
    """One of the twins: every test that asks for it runs on both."""
    twin: ModuleType = request.param
    return twin


@pytest.fixture
def pair(core: ModuleType) -> Iterator[Pair]:
    """Both ends of one direction, on either twin of the core."""
    made = Pair(core=core)
    yield made
    made.close()


@pytest.fixture
def never_looks_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A waiting side looks only when it is posted, so that a missing post can't go unnoticed."""
    in_vain: list[str] = []

    class Watched:
        """A bell that must not wait in vain."""

        def __init__(self) -> None:
            self._bell = shmtransport.core.Bell()
            self.post = self._bell.post

        def wait(self, rings: tuple[Any, ...], timeout_s: float) -> bool:
            posted = self._bell.wait(rings, timeout_s)
            if not posted and timeout_s == _LONG_SLICE_S:
                in_vain.append(threading.current_thread().name)
                raise AssertionError("no post came")
            return posted

    for module in (doorbell, doorbell_server):
        monkeypatch.setattr(module, "Bell", Watched)
    monkeypatch.setattr(relay, "SLICE_S", _LONG_SLICE_S)
    yield
    assert not in_vain, "a side waited for a post that never came"
