"""``bench latency`` and ``bench throughput``: calls with a tensor of N bytes, answered with a tensor of N bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ..harness import runner
from ..harness.results import LatencyRun, ThroughputRun
from ..reports import tables
from ..reports.ratios import targets
from .options import (
    ContendersOption,
    JsonOption,
    PinOption,
    PlotOption,
    RoundsOption,
    SecondsOption,
    SizesOption,
    command_of,
    contenders_of,
    sizes_of,
)
from .output import keep, show


@dataclass(frozen=True, kw_only=True)
class _RoundTripOptions:
    """The options of both commands, as given; their defaults differ."""

    contenders: ContendersOption = ""
    sizes: SizesOption
    seconds: SecondsOption = 0.4
    rounds: RoundsOption
    pin: PinOption = False
    json_file: JsonOption = None
    plot: PlotOption = None


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(_RoundTripOptions):
    """The options of ``bench latency``."""

    sizes: SizesOption = "64,65536,1048576,8388608,134217728"
    rounds: RoundsOption = 3


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(_RoundTripOptions):
    """The options of ``bench throughput``."""

    sizes: SizesOption = "64,1048576,67108864"
    rounds: RoundsOption = 2


@command_of(LatencyOptions)
def latency(options: LatencyOptions) -> None:
    """Time calls with a tensor of N bytes, answered with a tensor of N bytes."""
    run_latency(options)


@command_of(ThroughputOptions)
def throughput(options: ThroughputOptions) -> None:
    """Count the same calls per second, as many in flight as a contender can; making and checking tensors included."""
    run_throughput(options)


def run_latency(options: LatencyOptions) -> LatencyRun:
    """Measure, show and keep."""
    plan = runner.Plan(options.seconds, options.rounds, options.pin)
    run = runner.latency(contenders_of(options.contenders), sizes_of(options.sizes), plan)
    grids = [*tables.latency_grids(run), tables.overview_grid(run), tables.target_grid(targets(run, None))]
    show(run.setting, grids, run.skipped)
    keep(run, options.json_file, options.plot)
    return run


def run_throughput(options: ThroughputOptions) -> ThroughputRun:
    """Measure, show and keep."""
    plan = runner.Plan(options.seconds, options.rounds, options.pin)
    run = runner.throughput(contenders_of(options.contenders, moving_only=True), sizes_of(options.sizes), plan)
    show(run.setting, [tables.throughput_grid(run)], run.skipped)
    keep(run, options.json_file, options.plot)
    return run
