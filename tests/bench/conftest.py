"""A server's process is forked from one that has imported what it needs: ten fresh ones would take half a minute."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver, resource_sharer

import pytest

from bench import processes


@pytest.fixture(autouse=True, scope="module")
def quick_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Started before a test looks at what there is in the temporary directory, and gone after the last."""
    with pytest.MonkeyPatch.context() as patch:
        # The standard library would remove a directory of its own at exit, when this run's is gone already.
        patch.setitem(multiprocessing.current_process()._config, "tempdir", str(tmp_path_factory.mktemp("mp")))
        patch.setattr(processes, "START_METHOD", "forkserver")
        forkserver.set_forkserver_preload(["bench.contenders", "bench.seed_contenders"])
        forkserver.ensure_running()
        yield
        resource_sharer.stop()
        forkserver._forkserver._stop()
