"""Fixtures of the hostile tests: one server with its innocent clients for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.children import Mother

from .harness import Stage


@pytest.fixture(scope="session")
def mother() -> Iterator[Mother]:
    """What the processes are forked from."""
    mother = Mother()
    yield mother
    mother.end()


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, mother: Mother) -> Iterator[Stage]:
    """A server under attack, and innocent clients of it."""
    stage = Stage(mother, f"ipc://{tmp_path_factory.mktemp('stage')}/server.ipc")
    yield stage
    stage.end()
