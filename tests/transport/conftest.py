"""Fixtures of the transport tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmtransport import doorbell

from .arenas import Pair


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.fixture
def never_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a bell looks only when it is rung: a ring that is missing then can't go unnoticed."""
    monkeypatch.setattr(doorbell, "_SLICE_S", 3600.0)
