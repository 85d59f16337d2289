"""Ratios of medians from one run: the targets, and what ``make bench-check`` compares with stored ones.

A ratio of two contenders measured side by side says more than either time, which depends on the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..contenders import CONTENDERS
from ..harness.results import BaselineRun, LatencyRow, LatencyRun
from .grid import MIB, size_text

STORED = Path(__file__).with_name("ratios.json")
SMALLEST, LARGEST = 64, 128 * MIB
CHECK_SIZES = (SMALLEST, 8 * MIB, LARGEST)

_CLEAR_LOSS = 0.10  # a smaller one is ignored, however quiet the machine is
_RAW_ROUND_TRIP_US = 90.0  # of the machine for which the target of the baseline was set

_IN_PLACE = ("doorbell + spin, in place", "doorbell, in place", "zmq, in place")
_COPY_IN = ("doorbell + spin, copy in", "doorbell, copy in", "zmq, copy in")
_POLLING = tuple(name for name in CONTENDERS if "polling" in name)
_PEERS = tuple(name for name, one in CONTENDERS.items() if one.group == "peer")


@dataclass(frozen=True)
class Ratio:
    """The best median of some contenders at a size, divided by the best of others; ``limit`` is the target."""

    title: str
    limit: float
    above: tuple[str, ...]
    above_nbytes: int
    below: tuple[str, ...]
    below_nbytes: int


class Measured(msgspec.Struct, frozen=True):
    """A ratio as measured: the median of the rounds' ratios, and their range divided by it."""

    value: float
    noise: float


@dataclass(frozen=True)
class Target:
    """A target and what was reached; ``reached`` is None if the run lacks the figures."""

    title: str
    limit: float
    reached: float | None
    noise: float = 0.0


CHECKED: tuple[Ratio, ...] = (
    Ratio("doorbell + spin, 64 B / raw pyzmq REQ/REP", 0.10, _IN_PLACE[:1], 64, ("pyzmq REQ/REP, no tensor",), 64),
    Ratio("doorbell, 64 B / semaphore ping-pong", 1.25, _IN_PLACE[1:2], 64, ("semaphore ping-pong",), 64),
    Ratio("zmq, 64 B / raw DEALER/ROUTER", 1.25, _IN_PLACE[2:], 64, ("pyzmq DEALER/ROUTER, no tensor",), 64),
    *(Ratio(f"{name}: 128 MiB / 64 B", 1.3, (name,), LARGEST, (name,), SMALLEST) for name in _IN_PLACE),
    *(
        Ratio(f"copy in, {text} / its two memcpys", 1.15, _COPY_IN, nbytes, ("memcpy there and back",), nbytes)
        for text, nbytes in (("8 MiB", 8 * MIB), ("128 MiB", LARGEST))
    ),
    *(
        Ratio(f"{arrays}, 64 B / tensors", 1.5, (f"doorbell + spin, {arrays}",), 64, (f"doorbell + spin, {how}",), 64)
        for arrays, how in (("arrays in place", "in place"), ("arrays copy in", "copy in"))
    ),
)
"""The ratios that ``bench check`` compares; they need no optional package."""


def check_names() -> list[str]:
    """The contenders that ``bench check`` needs."""
    needed = {name for one in CHECKED for name in (*one.above, *one.below)}
    return [name for name in CONTENDERS if name in needed]


def measure_ratio(ratio: Ratio, run: LatencyRun) -> Measured | None:
    """The ratio in a run; None if the run lacks the figures."""
    rows = {(row.contender, row.nbytes): row for row in run.rows}
    above = _best(rows, ratio.above, ratio.above_nbytes)
    below = _best(rows, ratio.below, ratio.below_nbytes)
    if above is None or below is None:
        return None
    pairs = zip(above.round_p50_us, below.round_p50_us, strict=False)
    each = [high / low for high, low in pairs]
    value = statistics.median(each)
    return Measured(value, (max(each) - min(each)) / value)


def _best(rows: Mapping[tuple[str, int], LatencyRow], names: Sequence[str], nbytes: int) -> LatencyRow | None:
    found = (rows[name, nbytes] for name in names if (name, nbytes) in rows)
    return min(found, key=lambda row: row.p50_us, default=None)


def allowed(stored: Measured, now: Measured) -> float:
    """The highest value that is no loss: the stored one plus the larger noise of the two runs, or plus a tenth."""
    return stored.value * (1 + max(_CLEAR_LOSS, stored.noise, now.noise))


def losses(stored: Mapping[str, Measured], now: Mapping[str, Measured]) -> list[str]:
    """A line for each ratio that is clearly worse than the stored one, or was not measured."""
    found = [f"{title}: not measured" for title in stored if title not in now]
    for title, found_now in now.items():
        before = stored.get(title)
        if before is not None and found_now.value > allowed(before, found_now):
            limit = allowed(before, found_now)
            found.append(f"{title}: {found_now.value:.3f}, was {before.value:.3f}; up to {limit:.3f} is noise")
    return found


def targets(latency: LatencyRun | None, baseline: BaselineRun | None) -> list[Target]:
    """The project's targets, and what these runs reached."""
    found = []
    if latency is not None:
        for one in (*CHECKED, *_by_size(latency)):
            reached = measure_ratio(one, latency)
            if reached is None:
                found.append(Target(one.title, one.limit, None))
            else:
                found.append(Target(one.title, one.limit, reached.value, reached.noise))
    if baseline is not None:
        found += _of_baseline(baseline, latency)
    return found


def _by_size(run: LatencyRun) -> Iterator[Ratio]:
    """The ratios that have a target at every size."""
    sizes = sorted({row.nbytes for row in run.rows})
    for nbytes in sizes:
        title = f"doorbell + spin, in place / best polling peer, {size_text(nbytes)}"
        yield Ratio(title, 1.0, _IN_PLACE[:1], nbytes, _POLLING, nbytes)
    for nbytes in sizes:
        title = f"best of ours / best of all others, {size_text(nbytes)}"
        yield Ratio(title, 1.0, (*_IN_PLACE, *_COPY_IN), nbytes, _PEERS, nbytes)


def _of_baseline(baseline: BaselineRun, latency: LatencyRun | None) -> Iterator[Target]:
    totals = {row.contender: row.total_ms for row in baseline.rows if row.dtype == "float32" and row.pattern == "op"}
    ours = totals.get("doorbell + spin, in place")
    raw = latency and _best(
        {(row.contender, row.nbytes): row for row in latency.rows}, ("pyzmq REQ/REP, no tensor",), SMALLEST
    )
    scaled = ours * _RAW_ROUND_TRIP_US / raw.p50_us if ours and raw else None
    yield Target("baseline, float32, doorbell + spin, in place: ms, were raw pyzmq at 90 µs", 2.0, scaled)
    original = totals.get("original")
    yield Target("the same / the original", 1 / 5000, ours / original if ours and original else None)
    copied = min((totals[name] for name in _COPY_IN if name in totals), default=None)
    floor = totals.get("memcpy of the same bytes")
    yield Target(
        "baseline, float32, copy in / memcpy of the same bytes", 1.2, copied / floor if copied and floor else None
    )
