"""Replays the original system's forward in every way, in interleaved rounds, and sets the document's figures beside."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from .contenders.original import Original
from .results import SeedRow, SeedRun, setting
from .runner import in_process, with_progress
from .seed_contenders import SEED_CONTENDERS
from .seed_pair import SeedPairRow
from .seed_workload import DTYPES, PATTERNS

_MIB = 1 << 20

DOCUMENT = SeedRow(
    contender="the document's figures",
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
"""What was measured of the original system on its own machine; the total is the parts' sum."""


def seed(dtypes: Sequence[str], patterns: Sequence[str], names: Sequence[str], seconds: float, count: int) -> SeedRun:
    """Replay ``count`` rounds. The original takes half a minute a forward: it is replayed in one round, pattern op.

    Raises:
        RuntimeError: a way failed.
    """
    where = setting([Original], seconds=seconds, rounds=count)
    found: dict[tuple[str, str, str], list[SeedPairRow]] = {}
    work = [(number, name) for number in range(count) for name in names if number == 0 or name != "original"]
    for _, name in with_progress(work, lambda item: f"seed: {item[1]}"):
        asked = ["op"] if name == "original" else list(patterns)
        output = in_process("bench.seed_pair", name, ",".join(dtypes), ",".join(asked), str(seconds))
        for row in msgspec.json.decode(output, type=list[SeedPairRow]):
            found.setdefault((row.pattern, row.dtype, name), []).append(row)
    order = list(SEED_CONTENDERS)
    keys = sorted(
        found, key=lambda key: (list(PATTERNS).index(key[0]), list(DTYPES).index(key[1]), order.index(key[2]))
    )
    return SeedRun(where, [_row(name, dtype, pattern, found[pattern, dtype, name]) for pattern, dtype, name in keys])


def _row(name: str, dtype: str, pattern: str, rounds: list[SeedPairRow]) -> SeedRow:
    totals = [total for one in rounds for total in one.total_s]
    calls = len(PATTERNS[pattern])
    total_s = statistics.median(totals)
    serialise_s = statistics.median(one.serialise_s for one in rounds)
    deserialise_s = statistics.median(one.deserialise_s for one in rounds)
    return SeedRow(
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
