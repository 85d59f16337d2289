"""``python -m bench engine``: all splits beside the unsplit model, each in fresh processes, in one run.

The reference of a ratio is the faster of the unsplit model's two runs: with OpenMP's default and with passive threads.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import product

import msgspec
from rich.console import Console
from rich.progress import track

from llama_split.operations import REVEALED, Mode

from .engine_side import DEMO, UNSPLIT, UNSPLIT_PASSIVE, Job, Outcome
from .grids import Grid
from .results import EngineRow, EngineRun, setting

MODELS = (DEMO, "llama-3.2-1b", "llama-3.1-8b", "tinyllama-1.1b")
_TIMEOUT_S = 900.0


def engine(
    models: Iterable[str],
    dtypes: Iterable[str],
    modes: Iterable[str],
    channels: Iterable[str],
    prompts: list[int],
    new_tokens: int,
    repeats: int,
    threads: int,
    spin_us: float,
) -> EngineRun:
    """Measure everything asked for."""
    ways = [(UNSPLIT, ""), (UNSPLIT_PASSIVE, ""), *product(modes, channels)]
    jobs = [
        Job(
            model,
            dtype,
            mode,
            channel,
            spin_us if channel == "doorbell" else 0.0,
            prompts,
            new_tokens,
            repeats,
            threads,
        )
        for model, dtype in product(models, dtypes)
        for mode, channel in ways
    ]
    about = setting([], threads=threads, prompts=prompts, new_tokens=new_tokens, repeats=repeats, spin_us=spin_us)
    rows: list[EngineRow] = []
    tokens: dict[tuple[str, str], list[int]] = {}
    for job in track(jobs, description="engine", console=Console(stderr=True), transient=True):
        outcome = _run(job)
        expected = tokens.setdefault((job.model, job.dtype), outcome.token_ids)
        rows.append(_row(job, outcome, expected))
    return EngineRun(about, rows)


def _run(job: Job) -> Outcome:
    command = [sys.executable, "-m", "bench.engine_side", msgspec.json.encode(job).decode()]
    done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{job.mode} of {job.model} failed: {done.stderr.decode(errors='replace')}")
    return msgspec.json.decode(done.stdout, type=Outcome)


def _row(job: Job, outcome: Outcome, expected: list[int]) -> EngineRow:
    intervals = sorted(outcome.intervals)
    same = next(
        (place for place, pair in enumerate(zip(outcome.token_ids, expected, strict=True)) if pair[0] != pair[1]),
        len(expected),
    )
    return EngineRow(
        model=job.model,
        dtype=job.dtype,
        mode=job.mode,
        channel=job.channel,
        prefill_ms={str(one.tokens): statistics.median(one.seconds) * 1e3 for one in outcome.prefills},
        prefill_calls=outcome.prefills[0].calls,
        prefill_mib={str(one.tokens): (one.sent_bytes + one.received_bytes) / 2**20 for one in outcome.prefills},
        decode_p50_ms=statistics.median(intervals) * 1e3,
        decode_p99_ms=intervals[min(len(intervals) * 99 // 100, len(intervals) - 1)] * 1e3,
        decode_calls=outcome.decode_calls,
        decode_kib=outcome.decode_bytes / 2**10,
        same_tokens=same,
        tokens=len(expected),
        client_cpu_s=outcome.client_cpu_s,
        worker_cpu_s=outcome.worker_cpu_s,
    )


def engine_grids(run: EngineRun) -> Iterator[Grid]:
    """One table for each model and dtype, in the order in which they were measured."""
    for model, dtype in dict.fromkeys((row.model, row.dtype) for row in run.rows):
        rows = [row for row in run.rows if (row.model, row.dtype) == (model, dtype)]
        prompts = list(rows[0].prefill_ms)
        header = ["split", "calls", *(f"prefill {length} ms" for length in prompts), *("/ unsplit" for _ in prompts)]
        header += [
            f"MiB prefill {prompts[-1]}",
            f"decode after {prompts[0]}, p50 ms",
            "p99 ms",
            "tokens/s",
            "/ unsplit",
            "KiB a token",
            "same tokens",
            "CPU s",
        ]
        yield Grid(
            f"{model}, {dtype}",
            tuple(header),
            [tuple(_cells(row, rows, prompts)) for row in rows],
            frozenset({"split"}),
        )


def _cells(row: EngineRow, rows: list[EngineRow], prompts: list[str]) -> Iterator[str]:
    unsplit = [one for one in rows if one.mode in (UNSPLIT, UNSPLIT_PASSIVE)]
    yield f"{row.mode} {row.channel}".strip()
    yield f"{row.prefill_calls}"
    for length in prompts:
        yield f"{row.prefill_ms[length]:.1f}"
    for length in prompts:
        yield f"{row.prefill_ms[length] / min(one.prefill_ms[length] for one in unsplit):.2f}"
    yield f"{row.prefill_mib[prompts[-1]]:.1f}"
    yield f"{row.decode_p50_ms:.2f}"
    yield f"{row.decode_p99_ms:.2f}"
    yield f"{1e3 / row.decode_p50_ms:.1f}"
    yield f"{row.decode_p50_ms / min(one.decode_p50_ms for one in unsplit):.2f}"
    yield f"{row.decode_kib:.0f}"
    yield f"{row.same_tokens}/{row.tokens}"
    yield f"{row.client_cpu_s:.1f} + {row.worker_cpu_s:.1f}"


def revealed_grid() -> Grid:
    """What each split shows the worker."""
    return Grid(
        "What the worker sees",
        ("split", "the worker sees"),
        [(mode.value, REVEALED[mode]) for mode in Mode],
        frozenset({"the worker sees"}),
    )
