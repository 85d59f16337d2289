"""Fixtures of the transport tests."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from shmtransport.channels import relay
from shmtransport.memory.bell import Bell
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
    """A waiting side looks only when its bell rings, so that a missing ring can't go unnoticed."""
    in_vain: list[str] = []
    wait = Bell.wait

    def watched(bell: Bell, timeout_s: float | None) -> bool:
        rung = wait(bell, timeout_s)
        if not rung and timeout_s == _LONG_SLICE_S:
            in_vain.append(bell.name)
            raise AssertionError("nobody rang")
        return rung

    monkeypatch.setattr(Bell, "wait", watched)
    monkeypatch.setattr(relay, "SLICE_S", _LONG_SLICE_S)
    yield
    assert not in_vain, "someone waited for a ring that never came"
