"""Runs with made-up figures."""

from __future__ import annotations

from bench.contenders import CONTENDERS
from bench.harness.results import About, BaselineRow, BaselineRun, LatencyRow, LatencyRun, Setting

NOWHERE = Setting({"cores": "2"}, {"Python": "3"}, {"rounds": "2"})


def latency_run(*figures: tuple[str, int, list[float]]) -> LatencyRun:
    """A run with these medians of rounds, in microseconds, by contender and size."""
    rows = [LatencyRow(name, nbytes, 9, min(p50), p50[0], max(p50), p50, 1.0, 0.5) for name, nbytes, p50 in figures]
    abouts = {name: About.of(one) for name, one in CONTENDERS.items()}
    return LatencyRun(NOWHERE, abouts, {"grpcio": "not installed: grpcio"}, rows, {"zmq, in place": (0.0, 0.01)})


def baseline_run() -> BaselineRun:
    """A run of pattern op in float32."""

    def row(name: str, total_ms: float) -> BaselineRow:
        return BaselineRow(name, "float32", "op", 98, 3, total_ms, total_ms, [total_ms], 0.1, 0.1, 0.1, 0.1, 6984.5)

    names = {"doorbell + spin, in place": 1.0, "doorbell, copy in": 600.0, "memcpy of the same bytes": 500.0}
    return BaselineRun(NOWHERE, [row(name, total) for name, total in {**names, "original": 20_000.0}.items()])
