"""How rounds become rows, and rows become files."""

from __future__ import annotations

from pathlib import Path

from bench.contenders import CONTENDERS
from bench.harness.results import PairSize, latency_row, read, throughput_row, write

from .runs import baseline_run, latency_run


def test_rounds_become_one_row() -> None:
    """All samples count for the quantiles; the rounds' own medians stay."""
    first = PairSize(64, list(range(1000, 101_000, 1000)), 0.5, 0.25, 1.0, 100)
    second = PairSize(64, [5000] * 100, 0.5, 0.25, 1.0, 100)
    row = latency_row("grpcio", 64, [first, second])
    assert (row.calls, row.min_us, row.p50_us, row.p99_us) == (200, 1.0, 5.0, 99.0)
    assert row.round_p50_us == [50.5, 5.0]
    assert (row.client_cores, row.server_cores) == (0.5, 0.25)
    assert throughput_row(CONTENDERS["grpcio"], 64, [first]).bytes_per_s == 2 * 64 * 100


def test_runs_survive_json(tmp_path: Path) -> None:
    """A file records which kind of run it is."""
    for run in (latency_run(("grpcio", 64, [1.0])), baseline_run()):
        write(tmp_path / "run.json", run)
        assert read(tmp_path / "run.json") == run
