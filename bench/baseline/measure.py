"""Replays the original system's forward over every way, in interleaved rounds, beside the original's own profile."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from ..contenders.original import Original
from ..harness.results import BaselineRow, BaselineRun, setting
from ..harness.runner import in_process, with_progress
from .contenders import BASELINE_CONTENDERS
from .pair import ReplayedPattern
from .workload import DTYPES, PATTERNS

_MIB = 1 << 20
_ORIGINAL = "original"

ORIGINAL_PROFILE = BaselineRow(
    contender="the original's own profile",
    dtype="float32",
    pattern="op",
    calls=98,
    forwards=1,
    total_ms=98 * (332.5 + 46.3 + 25.5),
    min_total_ms=98 * (332.5 + 46.3 + 25.5),
    round_total_ms=[98 * (332.5 + 46.3 + 25.5)],
    rpc_ms_per_call=332.5,
    serialise_ms_per_call=46.3,
    deserialise_ms_per_call=25.5,
    zmq_mib=3328 + 3657,
    shm_mib=0.0,
)
"""What was measured of the original system on its own machine; the total is the sum of the three parts."""


@dataclass(frozen=True)
class ReplayPlan:
    """What to replay: names of dtypes, patterns and contenders, seconds for each in a round, and how many rounds."""

    dtypes: Sequence[str]
    patterns: Sequence[str]
    contenders: Sequence[str]
    seconds: float
    rounds: int


def replay_rounds(plan: ReplayPlan) -> BaselineRun:
    """Replay all rounds; the original, half a minute a forward, takes part in the first one only, with pattern op.

    Raises:
        RuntimeError: A contender failed.
    """
    where = setting([Original], seconds=plan.seconds, rounds=plan.rounds)
    found: dict[tuple[str, str, str], list[ReplayedPattern]] = {}
    for name in with_progress(list(_turns(plan)), lambda name: f"baseline: {name}"):
        patterns = ["op"] if name == _ORIGINAL else plan.patterns
        output = in_process("bench.baseline.pair", name, ",".join(plan.dtypes), ",".join(patterns), str(plan.seconds))
        for one in msgspec.json.decode(output, type=list[ReplayedPattern]):
            found.setdefault((one.pattern, one.dtype, name), []).append(one)
    return BaselineRun(where, [_row(*key, found[key]) for key in _in_order(found)])


def _turns(plan: ReplayPlan) -> Iterator[str]:
    """The contenders of all rounds, one after another."""
    for number in range(plan.rounds):
        yield from (name for name in plan.contenders if number == 0 or name != _ORIGINAL)


def _in_order(keys: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Pattern, dtype and contender, as each stands in its own list."""
    patterns, dtypes, contenders = list(PATTERNS), list(DTYPES), list(BASELINE_CONTENDERS)
    return sorted(keys, key=lambda key: (patterns.index(key[0]), dtypes.index(key[1]), contenders.index(key[2])))


def _row(pattern: str, dtype: str, name: str, rounds: list[ReplayedPattern]) -> BaselineRow:
    totals = [total for one in rounds for total in one.total_s]
    calls = len(PATTERNS[pattern])
    total_s = statistics.median(totals)
    serialise_s = statistics.median(one.serialise_s for one in rounds)
    deserialise_s = statistics.median(one.deserialise_s for one in rounds)
    return BaselineRow(
        contender=name,
        dtype=dtype,
        pattern=pattern,
        calls=calls,
        forwards=len(totals),
        total_ms=total_s * 1e3,
        min_total_ms=min(totals) * 1e3,
        round_total_ms=[statistics.median(one.total_s) * 1e3 for one in rounds],
        rpc_ms_per_call=max(total_s - serialise_s - deserialise_s, 0.0) / calls * 1e3,
        serialise_ms_per_call=serialise_s / calls * 1e3,
        deserialise_ms_per_call=deserialise_s / calls * 1e3,
        zmq_mib=rounds[0].zmq_bytes / _MIB,
        shm_mib=rounds[0].shm_bytes / _MIB,
    )
