"""``bench all``, ``quick`` and ``engine-all``: runs whose options are chosen here, for the Makefile."""

from __future__ import annotations

from ..harness.results import Run
from ..reports.documents import write_documents
from .baseline import BaselineOptions, run_baseline
from .engine import EngineOptions, run_engine
from .options import DOCUMENTS, IMAGES, ROOT
from .round_trips import LatencyOptions, ThroughputOptions, run_latency, run_throughput

_RUNS = ROOT / "build" / "bench"

ALL_LATENCY = LatencyOptions(seconds=0.2, rounds=2, json_file=_RUNS / "latency.json", plot=IMAGES)
ALL_THROUGHPUT = ThroughputOptions(seconds=0.2, rounds=1, json_file=_RUNS / "throughput.json", plot=IMAGES)
ALL_BASELINE = BaselineOptions(seconds=0.5, rounds=2, json_file=_RUNS / "baseline.json", plot=IMAGES)
SHORT_ENGINE = EngineOptions(dtypes="bfloat16", channels="doorbell", prompts="128", new_tokens=16, repeats=1)
ALL_ENGINE = EngineOptions(repeats=2, json_file=_RUNS / "engine.json")
QUICK_LATENCY = LatencyOptions(
    contenders="doorbell,zmq,polling,memcpy,semaphore", sizes="64,1048576,8388608", seconds=0.15, rounds=1
)
QUICK_BASELINE = BaselineOptions(contenders="doorbell,memcpy", dtypes="float32", patterns="op", seconds=0.3, rounds=1)


def everything() -> None:
    """Run every benchmark with every contender, a quarter of an hour; writes tables and plots into docs/."""
    runs: list[Run] = [run_latency(ALL_LATENCY), run_throughput(ALL_THROUGHPUT), run_baseline(ALL_BASELINE)]
    write_documents(DOCUMENTS, runs)
    run_engine(SHORT_ENGINE)


def quick() -> None:
    """Run the most telling part, less than two minutes, with the contenders that are installed."""
    run_latency(QUICK_LATENCY)
    run_baseline(QUICK_BASELINE)


def engine_all() -> None:
    """Run all splits in every dtype, channel and length, half an hour; writes the tables into docs/."""
    write_documents(DOCUMENTS, [run_engine(ALL_ENGINE)])
