"""Every test of the core that asks for ``core`` runs on both twins."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.support.cores import CORES


@pytest.fixture(scope="session", params=CORES)
def core(request: pytest.FixtureRequest) -> ModuleType:
    """One of the twins."""
    twin: ModuleType = request.param
    return twin
