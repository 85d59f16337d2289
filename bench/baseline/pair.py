"""Replays forwards in a fresh pair of processes: this one is the client and starts the server.

``python -m bench.baseline.pair CONTENDER DTYPES PATTERNS SECONDS`` prints a list of ``ReplayedPattern``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time

import msgspec

from ..harness.processes import scratch, served, settle
from .contenders import BASELINE_CONTENDERS, BaselineContender
from .content import check_result, check_whole_result
from .workload import OPERATIONS, PATTERNS

_MOST_FORWARDS = 200


class ReplayedPattern(msgspec.Struct, frozen=True):
    """One pattern in one pair: the seconds of each forward, and the means of one forward's breakdown."""

    dtype: str
    pattern: str
    total_s: list[float]
    serialise_s: float
    deserialise_s: float
    zmq_bytes: int
    shm_bytes: int


def replay(name: str, dtypes: list[str], patterns: list[str], seconds: float) -> list[ReplayedPattern]:
    """Replay forwards of every dtype and pattern, at least one each.

    Args:
        name: Which of ``BASELINE_CONTENDERS`` carries the tensors.
        dtypes: Names of dtypes.
        patterns: Names of patterns.
        seconds: How long to replay each pattern in each dtype.

    Raises:
        RuntimeError: Something other than what was sent arrived.
    """
    settle()
    make, options = BASELINE_CONTENDERS[name]
    with scratch() as directory, contextlib.ExitStack() as stack:
        contender = make(directory, *options)
        if contender.has_server:
            stack.enter_context(served(make, (directory, *options), contender))
        contender.connect()
        try:
            return [_replay(contender, dtype, pattern, seconds) for dtype in dtypes for pattern in patterns]
        finally:
            contender.close()


def _replay(contender: BaselineContender, dtype: str, pattern: str, seconds: float) -> ReplayedPattern:
    calls = [OPERATIONS.index(operation) for operation in PATTERNS[pattern]]
    operations = list(dict.fromkeys(calls))
    contender.load(operations, dtype)
    for _ in range(2):  # the first time makes the results and maps pages
        for operation in operations:
            check_whole_result(contender.call(operation, True), operation, dtype)
    gc.collect()
    before = contender.breakdown()
    totals: list[float] = []
    end = time.perf_counter() + seconds
    while not totals or (time.perf_counter() < end and len(totals) < _MOST_FORWARDS):
        totals.append(_forward(contender, calls, dtype))
    after = contender.breakdown()
    forwards = len(totals)
    return ReplayedPattern(
        dtype,
        pattern,
        totals,
        (after.serialise_s - before.serialise_s) / forwards,
        (after.deserialise_s - before.deserialise_s) / forwards,
        (after.zmq_bytes - before.zmq_bytes) // forwards,
        (after.shm_bytes - before.shm_bytes) // forwards,
    )


def _forward(contender: BaselineContender, calls: list[int], dtype: str) -> float:
    """Seconds that the calls of a forward take; results are checked between calls, untimed."""
    total_s = 0.0
    for operation in calls:
        started = time.perf_counter()
        result = contender.call(operation, False)
        total_s += time.perf_counter() - started
        check_result(result, operation, dtype)
        del result
    return total_s


def main() -> None:
    """Replay as the command line asks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=BASELINE_CONTENDERS)
    parser.add_argument("dtypes")
    parser.add_argument("patterns")
    parser.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    found = replay(arguments.contender, arguments.dtypes.split(","), arguments.patterns.split(","), arguments.seconds)
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
