"""Runs contenders in interleaved rounds, each in a fresh pair of processes, and gathers the results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .contender import Contender
from .pair import Measurement
from .results import About, LatencyRun, PairResult, PairSize, ThroughputRun, latency_row, setting, throughput_row

_PAIR_LIMIT_S = 240.0
_ERROR_CHARACTERS = 300

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Plan:
    """Seconds for each contender and size in a round, how many rounds, and whether each side is pinned to a core."""

    seconds: float
    rounds: int
    pin: bool = False


@dataclass
class Findings:
    """What the rounds measured so far, and which contenders are skipped for which reason."""

    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[tuple[str, int], list[PairSize]] = field(default_factory=dict)
    idle_cores: dict[str, tuple[float, float]] = field(default_factory=dict)


def in_process(module: str, *arguments: str) -> str:
    """The last line that ``python -m module …`` prints; if it takes too long, it and its children are killed.

    Raises:
        RuntimeError: It failed; carries the last line of its standard error.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # on both sides, as llama-split sets it
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=_PAIR_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it took longer than {_PAIR_LIMIT_S:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        last = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise RuntimeError(last[0][:_ERROR_CHARACTERS])
    return output.strip().splitlines()[-1]


def run_rounds(
    contenders: Sequence[type[Contender]],
    measurement: Measurement,
    sizes: Sequence[int],
    plan: Plan,
    idle_s: float = 0.0,
) -> Findings:
    """Run the contenders in turn, ``plan.rounds`` times; one that fails is skipped from then on.

    Args:
        contenders: The contenders to run, in this order.
        measurement: What to measure.
        sizes: Bytes of the tensors.
        plan: How long and how often.
        idle_s: How long to watch both sides without calls, in the first round.
    """
    found = Findings({one.name: reason for one in contenders if (reason := one.unavailable())})
    work = [(number, one) for number in range(plan.rounds) for one in contenders]
    for number, contender in with_progress(work, lambda item: item[1].name):
        name = contender.name
        if name in found.skipped:
            continue
        options = [*(["--idle-s", str(idle_s)] if number == 0 else []), *(["--pin"] if plan.pin else [])]
        arguments = (contender.import_path(), measurement, ",".join(map(str, sizes)), str(plan.seconds))
        try:
            output = in_process("bench.harness.pair", *arguments, *options)
        except RuntimeError as error:
            found.skipped[name] = f"failed: {error}"
            continue
        result = msgspec.json.decode(output, type=PairResult)
        for size in result.sizes:
            found.sizes.setdefault((name, size.nbytes), []).append(size)
        if result.idle_client_cores is not None and result.idle_server_cores is not None:
            found.idle_cores[name] = (result.idle_client_cores, result.idle_server_cores)
    return found


def with_progress(work: Sequence[_Item], name: Callable[[_Item], str]) -> Iterator[_Item]:
    """Iterate over the items, with a progress bar on the terminal that names the current one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(work))
        for item in work:
            progress.update(task, description=name(item))
            yield item
            progress.advance(task)


def latency(contenders: Sequence[type[Contender]], sizes: Sequence[int], plan: Plan, idle_s: float = 0.3) -> LatencyRun:
    """Measure round trips.

    Args:
        contenders: The contenders to measure; rows keep this order.
        sizes: Bytes of the tensors.
        plan: How long and how often.
        idle_s: How long to watch both sides without calls, to see which of them spin.
    """
    where = setting(_available(contenders), **vars(plan))
    found = run_rounds(contenders, "latency", sizes, plan, idle_s)
    rows = [latency_row(one.name, nbytes, each) for one, nbytes, each in _in_order(contenders, found)]
    abouts = {one.name: About.of(one) for one in contenders}
    return LatencyRun(where, abouts, found.skipped, rows, found.idle_cores)


def throughput(contenders: Sequence[type[Contender]], sizes: Sequence[int], plan: Plan) -> ThroughputRun:
    """Measure calls and bytes per second, with several calls in flight.

    Args:
        contenders: The contenders to measure; rows keep this order.
        sizes: Bytes of the tensors.
        plan: How long and how often.
    """
    where = setting(_available(contenders), **vars(plan))
    found = run_rounds(contenders, "throughput", sizes, plan)
    rows = [throughput_row(one, nbytes, each) for one, nbytes, each in _in_order(contenders, found)]
    return ThroughputRun(where, {one.name: About.of(one) for one in contenders}, found.skipped, rows)


def _available(contenders: Sequence[type[Contender]]) -> list[type[Contender]]:
    return [one for one in contenders if not one.unavailable()]


def _in_order(
    contenders: Sequence[type[Contender]], found: Findings
) -> Iterator[tuple[type[Contender], int, list[PairSize]]]:
    """What was measured of contenders that never failed: by size, then in the contenders' order."""
    for nbytes in sorted({nbytes for _, nbytes in found.sizes}):
        for one in contenders:
            if one.name not in found.skipped and (one.name, nbytes) in found.sizes:
                yield one, nbytes, found.sizes[one.name, nbytes]
