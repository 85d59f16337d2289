"""Runs every split of the chosen models beside the unsplit model, each in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import msgspec
from rich.console import Console
from rich.progress import track

from ..harness.results import EngineRow, EngineRun, setting
from . import llama_cpp
from .job import DEMO, UNSPLIT, UNSPLIT_PASSIVE, Job, Outcome

MODELS = (DEMO, "llama-3.2-1b", "llama-3.1-8b", "tinyllama-1.1b")
PEERS = (llama_cpp.ALONE, llama_cpp.RPC)
DTYPES = ("float32", "bfloat16", "float16")
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class EnginePlan:
    """What to run: all combinations of the first four, and the unsplit model in every dtype, on ``device``.

    ``prompts`` are lengths in tokens, ``repeats`` the forwards of each; ``threads`` are for each process; the worker
    spins for ``spin_us`` on the doorbell. With ``peers``, llama.cpp runs the same models where it can.
    """

    models: Sequence[str]
    dtypes: Sequence[str]
    modes: Sequence[str]
    channels: Sequence[str]
    prompts: list[int]
    new_tokens: int
    repeats: int
    threads: int
    spin_us: float
    peers: bool
    device: str = "cpu"


def measure_engine(plan: EnginePlan) -> EngineRun:
    """Run all jobs of a plan.

    Raises:
        SystemExit: A job failed.
    """
    about = setting(
        [],
        threads=plan.threads,
        prompts=plan.prompts,
        new_tokens=plan.new_tokens,
        repeats=plan.repeats,
        spin_us=plan.spin_us,
        device=plan.device,
    )
    rows: list[EngineRow] = []
    tokens: dict[tuple[str, str], list[int]] = {}
    for job in track(list(_jobs(plan)), description="engine", console=Console(stderr=True), transient=True):
        outcome = _run(job)
        expected = tokens.setdefault((job.model, job.dtype), outcome.token_ids)  # those of the unsplit model, the first
        rows.append(_row(job, outcome, expected))
    skipped: dict[str, str] = {}
    for model, dtype, peer in product(plan.models, plan.dtypes, PEERS if plan.peers else ()):
        found = _peer_row(plan, model, dtype, peer)
        if isinstance(found, EngineRow):
            rows.append(found)
        else:
            skipped[f"{peer}, {model}, {dtype}"] = found
    return EngineRun(about, rows, skipped)


def _peer_row(plan: EnginePlan, model: str, dtype: str, peer: str) -> EngineRow | str:
    """What a peer takes, or why it can't be measured here."""
    try:
        return llama_cpp.measure(
            model,
            dtype,
            peer,
            prompts=plan.prompts,
            new_tokens=plan.new_tokens,
            repeats=plan.repeats,
            threads=plan.threads,
        )
    except llama_cpp.Unavailable as error:
        return str(error)


def _jobs(plan: EnginePlan) -> Iterator[Job]:
    ways = [(UNSPLIT, ""), (UNSPLIT_PASSIVE, ""), *product(plan.modes, plan.channels)]
    for (model, dtype), (mode, channel) in product(product(plan.models, plan.dtypes), ways):
        yield Job(
            model=model,
            dtype=dtype,
            mode=mode,
            channel=channel,
            spin_us=plan.spin_us if channel == "doorbell" else 0.0,
            prompts=plan.prompts,
            new_tokens=plan.new_tokens,
            repeats=plan.repeats,
            threads=plan.threads,
            device=plan.device,
        )


def _run(job: Job) -> Outcome:
    command = [sys.executable, "-m", "bench.engine.job", msgspec.json.encode(job).decode()]
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
