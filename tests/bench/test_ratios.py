"""What counts as a loss, and what the targets and the report say about a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.contenders import CONTENDERS
from bench.ratios import CHECKED, Measured, allowed, losses, measured, size_text, targets
from bench.report import report
from bench.results import (
    About,
    LatencyRow,
    LatencyRun,
    PairSize,
    SeedRow,
    SeedRun,
    Setting,
    latency_row,
    read,
    throughput_row,
    write,
)

NOWHERE = Setting({"cores": "2"}, {"Python": "3"}, {"rounds": "2"})


def run_of(*figures: tuple[str, int, list[float]]) -> LatencyRun:
    """A run with these medians of rounds, in microseconds."""
    rows = [LatencyRow(name, nbytes, 9, min(p50), p50[0], max(p50), p50, 1.0, 0.5) for name, nbytes, p50 in figures]
    abouts = {name: About.of(kind) for name, kind in CONTENDERS.items()}
    return LatencyRun(NOWHERE, abouts, {"grpcio": "not installed: grpcio"}, rows, {"zmq, in place": (0.0, 0.01)})


def test_a_clear_loss_is_flagged() -> None:
    """Beyond a tenth, where both runs were quiet."""
    found = losses({"a / b": Measured(1.0, 0.02)}, {"a / b": Measured(1.2, 0.03)})
    assert found == ["a / b: 1.200, was 1.000; up to 1.100 is noise"]


@pytest.mark.parametrize("now", [Measured(1.09, 0.0), Measured(1.25, 0.3), Measured(0.5, 0.0)])
def test_noise_and_gains_are_no_loss(now: Measured) -> None:
    """A small difference, one that this run's own rounds show as well, and a gain."""
    assert not losses({"a / b": Measured(1.0, 0.02)}, {"a / b": now})


def test_noise_of_the_stored_run_counts_as_well() -> None:
    """What wavered then may waver now."""
    assert allowed(Measured(2.0, 0.4), Measured(3.0, 0.0)) == pytest.approx(2.8)


def test_what_was_not_measured_is_no_success() -> None:
    """A contender that failed would otherwise pass."""
    assert losses({"a / b": Measured(1.0, 0.0)}, {}) == ["a / b: not measured"]


def test_a_quotient_is_taken_round_by_round() -> None:
    """Drift that both share drops out."""
    quotient = next(one for one in CHECKED if "DEALER" in one.title)
    run = run_of(("zmq, in place", 64, [50.0, 100.0]), ("pyzmq DEALER/ROUTER, no tensor", 64, [40.0, 80.0]))
    assert measured(quotient, run) == Measured(1.25, 0.0)
    assert measured(quotient, run_of(("zmq, in place", 64, [50.0]))) is None


@pytest.mark.parametrize(("p50", "code"), [(50.0, 0), (53.0, 0), (80.0, 1)])
def test_check_fails_on_a_loss_only(p50: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line, against what --update has stored."""
    stored = ["--stored", str(tmp_path / "ratios.json")]

    def checked(ours: float, *options: str) -> int:
        found = run_of(("zmq, in place", 64, [ours, ours]), ("pyzmq DEALER/ROUTER, no tensor", 64, [40.0, 40.0]))
        monkeypatch.setattr("bench.runner.latency", lambda *_arguments, **_options: found)
        return CliRunner().invoke(app, ["check", *stored, *options]).exit_code

    assert checked(50.0) == 2  # nothing is stored yet
    assert checked(50.0, "--update") == 0
    assert checked(p50) == code


def test_the_best_of_each_side_is_compared() -> None:
    """At every size that was measured."""
    run = run_of(
        ("doorbell + spin, in place", 64, [10.0]),
        ("zmq, in place", 64, [50.0]),
        ("kickmsg polling, in place", 64, [5.0]),
        ("multiprocessing.Pipe", 64, [20.0]),
    )
    reached = {one.title: one.reached for one in targets(run, None)}
    assert reached["best of ours / best of all others, 64 B"] == 2.0
    assert reached["doorbell + spin, in place / best polling peer, 64 B"] == 2.0
    assert reached["zmq, 64 B / raw DEALER/ROUTER"] is None


def seed_run() -> SeedRun:
    def row(name: str, total_ms: float) -> SeedRow:
        return SeedRow(name, "float32", "op", 98, 3, total_ms, total_ms, [total_ms], 0.1, 0.1, 0.1, 0.1, 6984.5)

    names = {"doorbell + spin, in place": 1.0, "doorbell, copy in": 600.0, "memcpy of the same bytes": 500.0}
    return SeedRun(NOWHERE, [row(name, total) for name, total in {**names, "original": 20_000.0}.items()])


def test_the_seed_targets_are_scaled_to_the_machine() -> None:
    """2 ms were set for a machine where raw pyzmq takes 90 µs."""
    latency = run_of(("pyzmq REQ/REP, no tensor", 64, [45.0]))
    reached = {one.title: one.reached for one in targets(latency, seed_run())}
    assert reached["seed, float32, doorbell + spin, in place: ms, were raw pyzmq at 90 µs"] == pytest.approx(2.0)
    assert reached["the same / the original"] == pytest.approx(1 / 20_000)
    assert reached["seed, float32, copy in / memcpy of the same bytes"] == pytest.approx(1.2)


def test_rounds_become_one_row() -> None:
    """All samples count for the quantiles; the rounds' own medians stay."""
    first = PairSize(64, list(range(1000, 101_000, 1000)), 0.5, 0.25, 1.0, 100)
    second = PairSize(64, [5000] * 100, 0.5, 0.25, 1.0, 100)
    row = latency_row("grpcio", 64, [first, second])
    assert (row.calls, row.min_us, row.p50_us, row.p99_us) == (200, 1.0, 5.0, 99.0)
    assert row.round_p50_us == [50.5, 5.0]
    assert (row.client_cores, row.server_cores) == (0.5, 0.25)
    assert throughput_row("grpcio", 64, [first]).bytes_per_s == 2 * 64 * 100


def test_runs_survive_json(tmp_path: Path) -> None:
    """A file tells which kind of run it is."""
    for run in (run_of(("grpcio", 64, [1.0])), seed_run()):
        write(tmp_path / "run.json", run)
        assert read(tmp_path / "run.json") == run


def test_the_report_fills_the_documents_sections() -> None:
    """And only those that it has figures for; twice gives the same."""
    names = ("method", "targets", "latency", "throughput", "seed")
    document = "\n".join(f"<!-- bench:{name} -->old {name}<!-- /bench:{name} -->" for name in names)
    written = report(document, [run_of(("grpcio", 64, [12.3])), seed_run()])
    assert "| grpcio | 12.3 µs |" in written
    assert "not installed: grpcio" in written
    assert "old throughput" in written
    assert "old seed" not in written
    assert report(written, [run_of(("grpcio", 64, [12.3])), seed_run()]) == written
    with pytest.raises(ValueError, match="0 sections"):
        report("", [seed_run()])


def test_the_projects_own_document_has_all_sections() -> None:
    """``make bench`` writes into it."""
    document = (Path(__file__).parent.parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    report(document, [run_of(("grpcio", 64, [1.0])), seed_run()])
    assert "<!-- bench:throughput -->" in document


def test_sizes_read_well() -> None:
    assert [size_text(size) for size in (64, 1024, 65536, 1 << 20, 100 << 20, 1000)] == [
        "64 B",
        "1 KiB",
        "64 KiB",
        "1 MiB",
        "100 MiB",
        "1000 B",
    ]
