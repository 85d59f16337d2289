"""For this folder: what all imports have allocated is left out of the garbage collections after each test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collections() -> Iterator[None]:
    """Freeze what lives before the first test: a full collection then takes 1 ms instead of 150 ms."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
