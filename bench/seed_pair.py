"""One fresh pair of processes that replays forwards.

``python -m bench.seed_pair CONTENDER DTYPES PATTERNS SECONDS`` prints a list of SeedPairRow.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time

import msgspec

from .processes import scratch, served, settle
from .seed_contenders import SEED_CONTENDERS, SeedContender, check_result, check_whole_result
from .seed_workload import KINDS, PATTERNS

_MOST_FORWARDS = 200


class SeedPairRow(msgspec.Struct, frozen=True):
    """A pattern in one pair: seconds and bytes of one forward, medians of all."""

    dtype: str
    pattern: str
    total_s: list[float]
    serialise_s: float
    deserialise_s: float
    zmq_bytes: int
    shm_bytes: int


def replay(name: str, dtypes: list[str], patterns: list[str], seconds: float) -> list[SeedPairRow]:
    """Replay forwards for ``seconds`` each, at least one.

    Raises:
        RuntimeError: something else arrived than was sent.
    """
    settle()
    make, options = SEED_CONTENDERS[name]
    with scratch() as directory, contextlib.ExitStack() as stack:
        contender = make(directory, *options)
        if contender.has_server:
            stack.enter_context(served(make, (directory, *options), contender))
        contender.connect()
        try:
            return [_replay(contender, dtype, pattern, seconds) for dtype in dtypes for pattern in patterns]
        finally:
            contender.close()


def _replay(contender: SeedContender, dtype: str, pattern: str, seconds: float) -> SeedPairRow:
    numbers = [KINDS.index(kind) for kind in PATTERNS[pattern]]
    contender.load(tuple(dict.fromkeys(PATTERNS[pattern])), dtype)
    for _ in range(2):  # the first makes the results, and maps pages
        for number in dict.fromkeys(numbers):
            check_whole_result(contender.call(number, True), number, dtype)
    gc.collect()
    before = contender.parts()
    totals: list[float] = []
    end = time.perf_counter() + seconds
    while not totals or (time.perf_counter() < end and len(totals) < _MOST_FORWARDS):
        totals.append(_forward(contender, numbers, dtype))
    after = contender.parts()
    forwards = len(totals)
    return SeedPairRow(
        dtype,
        pattern,
        totals,
        (after.serialise_s - before.serialise_s) / forwards,
        (after.deserialise_s - before.deserialise_s) / forwards,
        (after.zmq_bytes - before.zmq_bytes) // forwards,
        (after.shm_bytes - before.shm_bytes) // forwards,
    )


def _forward(contender: SeedContender, numbers: list[int], dtype: str) -> float:
    """Seconds in the calls of a forward; what they gave is looked at in between."""
    total_s = 0.0
    for number in numbers:
        started = time.perf_counter()
        result = contender.call(number, False)
        total_s += time.perf_counter() - started
        check_result(result, number, dtype)
        del result
    return total_s


def median_s(rows: list[SeedPairRow]) -> float:
    """Of all forwards of all rounds."""
    return statistics.median(total for row in rows for total in row.total_s)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=SEED_CONTENDERS)
    parser.add_argument("dtypes")
    parser.add_argument("patterns")
    parser.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    found = replay(arguments.contender, arguments.dtypes.split(","), arguments.patterns.split(","), arguments.seconds)
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
