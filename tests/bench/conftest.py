"""Servers are forked from a process that has the imports done: ten fresh ones would take half a minute."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver, resource_sharer

import pytest

from bench.harness import processes


@pytest.fixture(scope="package")
def quick_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start the fork server before a test looks into the temporary directory, and stop it after the last test."""
    with pytest.MonkeyPatch.context() as patch:
        # The standard library would remove a directory of its own at exit, after this run's is gone.
        patch.setitem(multiprocessing.current_process()._config, "tempdir", str(tmp_path_factory.mktemp("mp")))
        patch.setattr(processes, "START_METHOD", "forkserver")
        forkserver.set_forkserver_preload(["bench.contenders", "bench.baseline.contenders"])
        forkserver.ensure_running()
        yield
        resource_sharer.stop()
        forkserver._forkserver._stop()
