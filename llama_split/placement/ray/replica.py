"""One replica: the trusted process, which places its workers and serves the model over HTTP."""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from pathlib import PurePath
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shmtransport import PeerDied

from ...boundary.choices import parse_channel
from ...errors import WorkerFailed
from ...serving.app import create_app
from ...serving.engine import Limits, default_kv_tokens
from ...serving.service import Service
from ...trusted.connection import Reachable
from ...trusted.model import SplitLlamaForCausalLM
from .actors import Relay, WorkerActor
from .plan import Plan
from .relayed import RelayedClient

_LOADING_S = 1800.0
_STOP_S = 10.0


class Elsewhere:
    """A worker on another node: connecting starts the actor there that holds its connection."""

    def __init__(self, address: str, bundle: dict[str, Any]) -> None:
        self._address = address
        self._bundle = bundle

    def connect(self, **options: Any) -> RelayedClient:
        """Connect to it; a ``trusted.connection.Reachable``."""
        relay = ray.remote(Relay).options(num_cpus=0, **self._bundle)
        start = functools.partial(relay.remote, self._address, options)
        return RelayedClient(start, self._address, options["timeout_s"], options["connect_timeout_s"])


class Replica:
    """A served model, with its workers. Ray Serve makes one for each replica, in a process of its own.

    Args:
        plan: what is served.

    Raises:
        LlamaSplitError: the model can't be loaded, or a worker does not start.
    """

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        self._plan = plan
        self._name = uuid.uuid4().hex[:12]
        self._workers = [self._place(worker) for worker in range(plan.workers + plan.elsewhere)]
        self._unavailable_since: float | None = None
        checkpoint = plan.open_checkpoint()
        tokenizer = checkpoint.tokenizer()
        self._model = SplitLlamaForCausalLM.from_pretrained(
            checkpoint,
            worker=[self._reach(index, address) for index, address in enumerate(self._addresses())],
            mode=plan.mode,
            dtype=plan.dtype,
            wire_dtype=plan.wire_dtype,
            channel=parse_channel(plan.channel),
            revive=self._wait_for_workers,
        )
        limits = Limits(plan.max_kv_tokens or default_kv_tokens(self._model), plan.max_waiting)
        name = plan.served_name or PurePath(str(checkpoint.path)).stem
        self._service = Service(self._model, tokenizer, name, limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Serve sends this replica's requests to."""
        return create_app(self._service, self._plan.api_key)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica for which this raises again and again.

        Raises:
            WorkerFailed: no worker has come back for long.
        """
        reason = await self._service.unavailable()
        if not reason:
            self._unavailable_since = None
            return
        since = self._unavailable_since = self._unavailable_since or time.monotonic()
        if time.monotonic() - since > self._plan.recovery_s:
            raise WorkerFailed(f"no worker for {self._plan.recovery_s:g} s: {reason}")

    def __del__(self) -> None:
        for name in ("_service", "_model"):
            if name in self.__dict__:  # or it was not made in full
                self.__dict__[name].close()
        with contextlib.suppress(RayError):
            ray.get([worker.stop.remote() for worker in self.__dict__.get("_workers", ())], timeout=_STOP_S)

    def _place(self, worker: int) -> ActorHandle[WorkerActor]:
        """Start a worker in its bundle of this replica's placement group."""
        placed = ray.remote(WorkerActor).options(
            num_cpus=self._plan.cpus,
            num_gpus=self._plan.gpus,
            max_restarts=-1,
            max_task_retries=-1,
            **_in_bundle(self._plan.bundle_of(worker)),
        )
        return placed.remote(self._plan.without_key(), self._name, worker)

    def _wait_for_workers(self) -> None:
        """Wait until all workers answer, those included that Ray is starting again.

        Raises:
            shmtransport.PeerDied: one does not come back.
        """
        try:
            self._addresses()
        except WorkerFailed as error:
            raise PeerDied(str(error)) from error

    def _addresses(self) -> list[str]:
        """Where the workers listen, once all do.

        Raises:
            WorkerFailed: one did not start.
        """
        try:
            addresses: list[str] = ray.get([worker.address.remote() for worker in self._workers], timeout=_LOADING_S)
        except RayError as error:
            raise WorkerFailed(f"a worker did not start: {error}") from error
        return addresses

    def _reach(self, worker: int, address: str) -> str | Reachable:
        if not self._plan.is_elsewhere(worker):
            return address
        return Elsewhere(address, _in_bundle(self._plan.bundle_of(worker)))


def _in_bundle(index: int) -> dict[str, Any]:
    """Options of an actor in a bundle of this process's placement group."""
    group = get_current_placement_group()
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, index)}
