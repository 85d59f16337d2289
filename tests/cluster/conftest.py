"""Fixtures of the tests on a Ray cluster: two nodes on this machine, and the small model that speaks in words.

They take a minute and need the extra ``ray``: ``make test-cluster`` runs them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.conftest import Speaking, speaking
from tests.support.helpers import eventually

__all__ = ["speaking"]

KEY = "open sesame"
_CPUS = 4
_STORE_BYTES = 100 << 20
_RECOVERY_S = 90.0


@dataclass(frozen=True)
class Deployed:
    """The running application."""

    url: str
    speaking: Speaking

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=_RECOVERY_S)

    def is_serving(self) -> bool:
        with contextlib.suppress(openai.OpenAIError), self.client() as client:
            return bool(client.models.list().data)
        return False

    def answers(self, prompts: list[str], tokens: int) -> list[str]:
        """What it answers, greedily, to prompts that are all sent at once."""
        with self.client() as client, ThreadPoolExecutor(len(prompts)) as pool:

            def ask(prompt: str) -> str:
                made = client.completions.create(model="speaking", prompt=prompt, max_tokens=tokens, temperature=0)
                return made.choices[0].text

            return list(pool.map(ask, prompts))

    def check(self, prompts: list[str], tokens: int = 24) -> None:
        """Compare the answers to those of the unsplit model."""
        assert self.answers(prompts, tokens) == [self.speaking.answer(prompt, tokens) for prompt in prompts]


def processes_of(actor: str) -> set[int]:
    """The processes of an actor class of this run's cluster. Ray names them."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(f"ray::{actor}".encode()):
                environment = (entry / "environ").read_bytes()
                if f"TMPDIR={tempfile.gettempdir()}".encode() in environment.split(b"\0"):
                    found.add(int(entry.name))
    return found


@contextlib.contextmanager
def killed(actor: str) -> Iterator[None]:
    """Kill one process of an actor class; after the block, Ray has started another."""
    before = processes_of(actor)
    assert before
    os.kill(min(before), signal.SIGKILL)
    yield
    assert eventually(lambda: len(processes_of(actor)) == len(before) and processes_of(actor) != before, _RECOVERY_S)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Two nodes; the address at which the application listens."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'shmtransport[ray]'")
    from ray import serve
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node: dict[str, Any] = {"num_cpus": _CPUS, "object_store_memory": _STORE_BYTES}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    temporary = f"{tempfile.gettempdir()}/ray"
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, "temp_dir": temporary})
    nodes.add_node(**node, temp_dir=temporary)
    ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def deploy(cluster: str, speaking: Speaking) -> Iterator[Callable[..., Deployed]]:
    """Deploy the application with these options; it is deleted after the test."""
    from ray import serve

    from llama_split.placement.ray import app

    def deployed(**options: Any) -> Deployed:
        plan = {
            "model": str(speaking.path),
            "served_name": "speaking",
            "api_key": KEY,
            "max_kv_tokens": 2048,
            **options,
        }
        serve.run(app(plan), name="tested")
        return Deployed(cluster, speaking)

    yield deployed
    serve.delete("tested")
    assert eventually(lambda: not processes_of("WorkerActor"), 30.0)
