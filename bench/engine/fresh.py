"""What the measurements of the shields share: a fresh process for each, and the time of a token."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any, Protocol, TypeVar

import msgspec

from llama_split.model.kv_cache import GrowingCache

from .job import prompt_for

Run = TypeVar("Run")

DECODE_PROMPT = 64
NEW_TOKENS = 32


class Job(Protocol):
    """What one process measures."""

    @property
    def model(self) -> str:
        """Its name."""

    @property
    def threads(self) -> int:
        """That each side computes with."""


def run_fresh(module: str, job: Job, name: str, run: type[Run]) -> Run:
    """Measure in a fresh process, with threads that sleep while the other side computes.

    Args:
        module: What the process runs; it takes the job, and prints the run, as JSON.
        job: What to measure.
        name: The job's, for an error.
        run: The type of what is measured.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, "-m", module, msgspec.json.encode(job).decode()]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr.decode(errors='replace')}")
    return msgspec.json.decode(done.stdout, type=run)


def token_s(model: Any) -> float:
    """The median seconds between the tokens of a generation, split or not."""
    ids = prompt_for(model, DECODE_PROMPT)
    cache = GrowingCache(model.config.num_hidden_layers, DECODE_PROMPT + NEW_TOKENS)
    model(ids, past_key_values=cache, logits_to_keep=1)
    times = []
    for _ in range(NEW_TOKENS):
        started = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
