"""Fixtures of the hostile tests: one server with its innocent clients for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.children import Mother

from .harness import Stage


@pytest.fixture(scope="package")
def stage(tmp_path_factory: pytest.TempPathFactory, mother: Mother) -> Iterator[Stage]:
    """A server under attack, and innocent clients of it that call all the time, until the last attack is over."""
    stage = Stage(mother, f"ipc://{tmp_path_factory.mktemp('stage')}/server.ipc")
    yield stage
    stage.end()
