"""``llama-split serve --ray``: the same server as an application on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import typer

from ..errors import LlamaSplitError
from .console import notice
from .options import AdvancedOptions, SplitOptions
from .settings import DEVICE_VARIABLE, DTYPE_VARIABLE, MODEL_VARIABLE, Settings

_TAKEN = {"channel", "random_weights", "seed"}  # of the advanced options


@dataclass(frozen=True)
class RayOptions:
    """Where Ray places the processes."""

    ray: Annotated[
        bool, typer.Option("--ray", help="Serve on the Ray cluster of this machine, or on one that is started for it.")
    ] = False
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: trusted processes, each with its own workers.")] = 1
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: the most replicas as requests grow. Default: --replicas.")
    ] = None
    workers: Annotated[
        int, typer.Option(min=1, help="With --ray: workers that share the layers beside each trusted process.")
    ] = 1
    elsewhere: Annotated[
        int, typer.Option(min=0, help="With --ray: further workers that share the layers, each on another node.")
    ] = 0
    cpus: Annotated[
        float, typer.Option(help="With --ray: CPUs that are reserved for each process, and its threads.")
    ] = 1.0
    gpus: Annotated[float, typer.Option(min=0.0, help="With --ray: GPUs that are reserved for each worker.")] = 0.0


def check_unused(options: RayOptions) -> None:
    """Refuse options of a cluster where there is none.

    Raises:
        LlamaSplitError: one was given without ``--ray``.
    """
    if not options.ray and (given := _changed(options)):
        raise LlamaSplitError(f"{_flags(given)} would have no effect without --ray")


def serve_on_ray(
    options: RayOptions,
    split: SplitOptions,
    advanced: AdvancedOptions,
    serving: Mapping[str, object],
    host: str,
    port: int,
) -> None:
    """Serve until SIGINT.

    Args:
        options: where the processes stand.
        split: which model, and how it is split.
        advanced: of these, the channel and random weights have an effect.
        serving: further fields of ``placement.ray.plan.Plan``.
        host: the address to listen at, on every node that has a replica. Where Serve runs already, it keeps its own.
        port: the port to listen at; the same holds.

    Raises:
        LlamaSplitError: an option can't be used on a cluster, or the application did not start.
    """
    useless = [name for name in _changed(advanced) if name not in _TAKEN] + (["worker"] if split.worker else [])
    if useless:
        raise LlamaSplitError(f"{_flags(useless)} would have no effect with --ray, which starts the workers")
    from ..placement.ray import run

    settings = Settings(report=notice)
    placed = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "ray"}
    plan = {
        **placed,
        **serving,
        "model": settings.pick(split.model, MODEL_VARIABLE, None),
        "dtype": settings.pick(split.dtype, DTYPE_VARIABLE, "float32"),
        "device": settings.pick(split.device, DEVICE_VARIABLE, "cpu"),
        "mode": split.mode,
        "wire_dtype": split.wire_dtype,
        "channel": advanced.channel,
        "random_weights": advanced.random_weights,
        "seed": advanced.seed,
    }
    notice(f"serving on Ray at http://{host}:{port}/v1, or where its HTTP proxies listen already")
    run(plan, host, port)


def _changed(options: RayOptions | AdvancedOptions) -> list[str]:
    """The options that differ from their defaults."""
    return [field.name for field in fields(options) if getattr(options, field.name) != field.default]


def _flags(names: Sequence[str]) -> str:
    """Options as on the command line."""
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)
