"""The server on a Ray cluster of two nodes: answers are those of the unsplit model, whichever process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.conftest import Speaking
from tests.support.helpers import eventually

from .conftest import KEY, Deployed, killed, processes_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

PROMPTS = ["w5 w6", "w7 w8 w9", "w10", "w11 w12 w13 w14", "w15 w3", "w99"]


def placements() -> list[list[str]]:
    """For each placement group in use, the nodes of its bundles."""
    from ray.util import placement_group_table

    groups = placement_group_table().values()
    return [list(one["bundles_to_node_id"].values()) for one in groups if one["state"] == "CREATED"]


def test_two_replicas_serve_and_a_killed_worker_costs_no_answer(deploy: Callable[..., Deployed]) -> None:
    """Each has its worker on its own node. While Ray starts a killed one again, all requests are answered right.

    Those under way when it is killed as well.
    """
    deployed = deploy(replicas=2)
    assert [len(set(nodes)) for nodes in placements()] == [1, 1]
    assert (len(processes_of("WorkerActor")), processes_of("Relay")) == (2, set())
    deployed.check(PROMPTS)
    before = processes_of("WorkerActor")
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(deployed.check, [*PROMPTS, *PROMPTS], 100)
        time.sleep(0.5)
        with killed("WorkerActor"):
            deployed.check(PROMPTS)
        under_way.result()
    for prompt in PROMPTS:  # with few under way, Serve sends them to both
        deployed.check([prompt] * 2, tokens=6)
    assert len(processes_of("WorkerActor") & before) == 1, "the other worker was not to be touched"
    assert len(processes_of("ServeReplica")) == 2


@pytest.mark.parametrize("mode", ["op", "fused", "layer", "stack"])
def test_layers_on_two_nodes_give_the_same_tokens(deploy: Callable[..., Deployed], mode: str) -> None:
    """Hidden states cross nodes by Ray; a worker or relay there that is killed costs no token."""
    deployed = deploy(mode=mode, elsewhere=1)
    assert [len(set(nodes)) for nodes in placements()] == [2]
    assert (len(processes_of("WorkerActor")), len(processes_of("Relay"))) == (2, 1)
    deployed.check(PROMPTS)
    if mode in ("fused", "stack"):
        for actor in ("Relay", "WorkerActor"):
            with killed(actor):
                deployed.check(PROMPTS)


def test_the_command_serves_until_it_is_told_to_end(
    cluster: str, speaking: Speaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``llama-split serve --ray`` joins the cluster that is there, and its application ends with it."""
    import ray

    address = ray.get_runtime_context().gcs_address
    options = ["--model", str(speaking.path), "--served-name", "speaking", "--api-key", KEY, "--max-kv-tokens", "2048"]
    with subprocess.Popen(
        [sys.executable, "-m", "llama_split", "serve", "--ray", *options],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as command:
        try:
            deployed = Deployed(cluster, speaking)
            assert eventually(deployed.is_serving, 90.0)
            deployed.check(PROMPTS)
            command.send_signal(signal.SIGTERM)
            assert command.wait(60.0) == 0
        finally:
            command.kill()
    assert eventually(lambda: not processes_of("WorkerActor"), 30.0)
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
