"""The application, for ``serve run`` and for ``llama-split serve --ray``."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from ...errors import LlamaSplitError
from .plan import Plan
from .replica import Replica

_NAME = "llama-split"
_LOOK_S = 0.5  # a signal may be taken by another thread, which does not interrupt a longer sleep
_CLOSING_S = 15.0  # after its last request, for a replica to end its workers
_MOST_ONGOING = 10_000  # the replica refuses what exceeds its own limit, with an error that clients know


def app(options: dict[str, Any]) -> serve.Application:
    """Build the application: ``serve run llama_split.placement.ray:app mode=stack replicas=2``.

    Args:
        options: the fields of ``Plan``; a value may be text.

    Raises:
        LlamaSplitError: an option is unknown, or a value can't be used.
    """
    return _application(Plan.of(options))


def _application(plan: Plan) -> serve.Application:
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=_NAME,
        ray_actor_options={"num_cpus": plan.cpus},
        placement_group_bundles=plan.bundles,
        placement_group_strategy=plan.strategy,
        max_ongoing_requests=_MOST_ONGOING,
        graceful_shutdown_timeout_s=plan.drain_s + _CLOSING_S,
        autoscaling_config={
            "min_replicas": plan.replicas,
            "max_replicas": plan.most_replicas,
            "target_ongoing_requests": plan.requests_per_replica,
        },
    )
    bound: serve.Application = deployment.bind(plan)
    return bound


def run(options: dict[str, Any], host: str, port: int) -> None:
    """Serve the application until SIGINT or SIGTERM, on the cluster of this machine or on one that is started for it.

    Running requests then have the plan's ``drain_s`` to finish.

    Args:
        options: as for ``app``.
        host: the address to listen at, on every node that has a replica. Where Serve runs already, it keeps its own.
        port: the port to listen at; the same holds.

    Raises:
        LlamaSplitError: an option can't be used, or the application did not start.
    """
    plan = Plan.of(options)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            serve.start(http_options={"host": host, "port": port})
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # only now: starting sets Ray's own handler
            try:
                _serve(plan)
            finally:
                _end(plan.drain_s + 2 * _CLOSING_S)
    finally:
        ray.shutdown()  # ends the cluster if it was started here


def _serve(plan: Plan) -> None:
    """Deploy the application and stay."""
    try:
        serve.run(_application(plan), name=_NAME)
    except (RuntimeError, RayError) as error:
        raise LlamaSplitError(f"the application did not start: {error}") from error
    while True:
        time.sleep(_LOOK_S)


def _end(within_s: float) -> None:
    """Delete the application, and wait until its replicas have ended."""
    serve.delete(_NAME, _blocking=False)
    deadline = time.monotonic() + within_s
    while _NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
