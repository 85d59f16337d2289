"""The application, for ``serve run`` and for ``llama-split serve --ray``."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import Any

import ray
from ray import serve

from .plan import Plan
from .replica import Replica

_NAME = "llama-split"
_LOOK_S = 0.5  # a signal may be taken by another thread, which does not interrupt a longer sleep


def app(options: dict[str, Any]) -> serve.Application:
    """Build the application: ``serve run llama_split.placement.ray:app mode=stack replicas=2``.

    Args:
        options: the fields of ``Plan``; a value may be text.

    Raises:
        LlamaSplitError: an option is unknown, or a value can't be used.
    """
    plan = Plan.of(options)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=_NAME,
        ray_actor_options={"num_cpus": plan.cpus},
        placement_group_bundles=plan.bundles,
        placement_group_strategy=plan.strategy,
        max_ongoing_requests=plan.max_waiting,
        graceful_shutdown_timeout_s=plan.drain_s,
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
        host: the address to listen at, on every node.
        port: the port to listen at.

    Raises:
        LlamaSplitError: an option can't be used.
    """
    built = app(options)
    serve.start(http_options={"host": host, "port": port})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            serve.run(built, name=_NAME)
            while True:
                time.sleep(_LOOK_S)
    finally:
        serve.delete(_NAME)
        ray.shutdown()  # ends the cluster if it was started here
