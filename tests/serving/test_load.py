"""Under load: every answer that is finished is right, and nothing is left over."""

from __future__ import annotations

import os
from typing import Any

import pytest

from llama_split import SplitLlamaForCausalLM
from llama_split.serving.service import Service
from tests.support.helpers import eventually
from tests.support.workers import Workers

from .conftest import Speaking, serving
from .load import Load

SECONDS = float(os.environ.get("LOAD_SECONDS", "2.5"))
CLIENTS = int(os.environ.get("LOAD_CLIENTS", "12"))
KILLS = int(os.environ.get("LOAD_KILLS", "2"))


def _free_room(service: Service) -> int:
    """Parts of the KV cache that no request holds, once none is in progress."""
    processor: Any = service.engine._manager.batch_processor
    assert eventually(lambda: not processor.has_pending_requests())
    processor.cache.pool.try_to_free_sectors()  # otherwise the scheduler's next step does that
    return int(processor.cache.pool.num_free_sectors)


# The client library leaves generators of a stream that is not read to its end to a garbage collection, which may run
# in the scheduler's thread here, since client and server share this process.
@pytest.mark.filterwarnings(
    "ignore:.*(AsyncResponseStream|BoundAsyncStream|aiter_raw):pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("mode", ["fused", "stack"])
def test_many_clients_some_of_which_leave_while_the_worker_is_killed(
    speaking: Speaking, workers: Workers, mode: str
) -> None:
    """Each answer is the unsplit model's; after that no request runs or waits, no KV is held, no file stays open."""
    workers.start()
    with (
        SplitLlamaForCausalLM.from_pretrained(
            speaking.path, worker=workers.address, revive=workers.start, mode=mode
        ) as split,
        serving(speaking.service(split, waiting=256)) as served,
    ):
        Load(served, speaking, workers.kill).run(2, 0.5, 0)
        room, before = _free_room(served.service), len(os.listdir("/proc/self/fd"))
        totals = Load(served, speaking, workers.kill).run(CLIENTS, SECONDS, KILLS)
        assert totals.wrong == []
        assert totals.answered > 5 * totals.left > 0
        assert split.workers[0].epoch >= KILLS
        engine = served.service.engine
        assert eventually(lambda: (engine.running, engine.waiting) == (0, 0))
        assert _free_room(served.service) == room
        assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)
        workers.kill()
        print(totals.answered, "answered,", totals.left, "left")
