"""Runs contenders in interleaved rounds, each in a fresh pair of processes, and gathers what they find."""

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

from .contenders import CONTENDERS, Contender
from .results import About, LatencyRun, PairResult, PairSize, ThroughputRun, latency_row, setting, throughput_row

_PAIR_LIMIT_S = 240.0
_ERROR_CHARACTERS = 300

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Plan:
    """How long each contender is measured at each size in a round, how many rounds, and whether sides are pinned."""

    seconds: float
    rounds: int
    pin: bool = False


@dataclass
class Found:
    """What the rounds have found so far, and who is skipped for which reason."""

    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[tuple[str, int], list[PairSize]] = field(default_factory=dict)
    idle_cores: dict[str, tuple[float, float]] = field(default_factory=dict)


def chosen(names: str | None, moving_only: bool = False) -> list[type[Contender]]:
    """The contenders of these comma-separated parts of names; all, if there are none.

    A comma of a name stands for itself: "zmq, copy in" is one contender, "zmq" two.

    Raises:
        ValueError: a part fits no contender.
    """
    found = [kind for kind in CONTENDERS.values() if kind.moves_tensors or not moving_only]
    if not names:
        return found
    if names in CONTENDERS:
        return [CONTENDERS[names]]
    wanted = []
    for part in names.split(","):
        fitting = [kind for kind in found if part.strip().lower() in kind.name.lower()]
        if not fitting:
            raise ValueError(f"no contender is called {part.strip()!r}; there are: {'; '.join(CONTENDERS)}")
        wanted += fitting
    return [kind for kind in found if kind in wanted]


def in_process(module: str, *arguments: str) -> str:
    """What ``python -m module …`` prints; it and all that it started are ended if it takes too long.

    Raises:
        RuntimeError: it failed; with the end of what it says.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # for both sides, as llama-split sets it
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=_PAIR_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"took longer than {_PAIR_LIMIT_S:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        last = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise RuntimeError(last[0][:_ERROR_CHARACTERS])
    return output.strip().splitlines()[-1]


def rounds(kinds: Sequence[type[Contender]], mode: str, sizes: Sequence[int], plan: Plan, idle_s: float = 0.0) -> Found:
    """Run each contender ``plan.rounds`` times, in turns; one that fails is skipped with the reason from then on."""
    found = Found({kind.name: reason for kind in kinds if (reason := kind.unavailable())})
    work = [(number, kind) for number in range(plan.rounds) for kind in kinds]
    for number, kind in with_progress(work, lambda item: item[1].name):
        if kind.name in found.skipped:
            continue
        options = [*(["--idle-s", str(idle_s)] if number == 0 else []), *(["--pin"] if plan.pin else [])]
        asked = (kind.name, mode, ",".join(map(str, sizes)), str(plan.seconds))
        try:
            output = in_process("bench.pair", *asked, *options)
        except RuntimeError as error:
            found.skipped[kind.name] = f"failed: {error}"
            continue
        result = msgspec.json.decode(output, type=PairResult)
        for size in result.sizes:
            found.sizes.setdefault((kind.name, size.nbytes), []).append(size)
        if result.idle_client_cores is not None and result.idle_server_cores is not None:
            found.idle_cores[kind.name] = (result.idle_client_cores, result.idle_server_cores)
    return found


def with_progress(work: Sequence[_Item], name: Callable[[_Item], str]) -> Iterator[_Item]:
    """The items one after the other, with a bar on the terminal that names the one that is under way."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(work))
        for item in work:
            progress.update(task, description=name(item))
            yield item
            progress.advance(task)


def latency(kinds: Sequence[type[Contender]], sizes: Sequence[int], plan: Plan, idle_s: float = 0.3) -> LatencyRun:
    """Measure round trips, and for ``idle_s`` who is busy while nobody calls."""
    where = setting(_usable(kinds), **vars(plan))
    found = rounds(kinds, "latency", sizes, plan, idle_s)
    rows = [latency_row(name, nbytes, each) for (name, nbytes), each in _in_order(found)]
    abouts = {kind.name: About.of(kind) for kind in kinds}
    return LatencyRun(where, abouts, found.skipped, rows, found.idle_cores)


def throughput(kinds: Sequence[type[Contender]], sizes: Sequence[int], plan: Plan) -> ThroughputRun:
    """Measure how much gets through with several calls under way."""
    where = setting(_usable(kinds), **vars(plan))
    found = rounds(kinds, "throughput", sizes, plan)
    rows = [throughput_row(name, nbytes, each) for (name, nbytes), each in _in_order(found)]
    return ThroughputRun(where, {kind.name: About.of(kind) for kind in kinds}, found.skipped, rows)


def _usable(kinds: Sequence[type[Contender]]) -> list[type[Contender]]:
    return [kind for kind in kinds if not kind.unavailable()]


def _in_order(found: Found) -> list[tuple[tuple[str, int], list[PairSize]]]:
    """By size, then as the contenders stand in their list."""
    names = list(CONTENDERS)
    complete = ((key, each) for key, each in found.sizes.items() if key[0] not in found.skipped)
    return sorted(complete, key=lambda item: (item[0][1], names.index(item[0][0])))
