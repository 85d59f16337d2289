"""What counts as a loss, and which targets a run reaches."""

from __future__ import annotations

import pytest

from bench.reports.ratios import CHECKED, Measured, allowed, losses, measure_ratio, targets

from .runs import baseline_run, latency_run


def test_a_clear_loss_is_flagged() -> None:
    """Beyond a tenth, where both runs were quiet."""
    found = losses({"a / b": Measured(1.0, 0.02)}, {"a / b": Measured(1.2, 0.03)})
    assert found == ["a / b: 1.200, was 1.000; up to 1.100 is noise"]


@pytest.mark.parametrize("now", [Measured(1.09, 0.0), Measured(1.25, 0.3), Measured(0.5, 0.0)])
def test_noise_and_gains_are_no_loss(now: Measured) -> None:
    """A small difference, one within the spread of this run's own rounds, and a gain."""
    assert not losses({"a / b": Measured(1.0, 0.02)}, {"a / b": now})


def test_noise_of_the_stored_run_counts_as_well() -> None:
    """A ratio that was noisy then may be noisy now."""
    assert allowed(Measured(2.0, 0.4), Measured(3.0, 0.0)) == pytest.approx(2.8)


def test_what_was_not_measured_is_no_success() -> None:
    """A contender that failed would otherwise pass."""
    assert losses({"a / b": Measured(1.0, 0.0)}, {}) == ["a / b: not measured"]


def test_a_ratio_is_taken_round_by_round() -> None:
    """Drift that both share cancels out."""
    ratio = next(one for one in CHECKED if "DEALER" in one.title)
    run = latency_run(("zmq, in place", 64, [50.0, 100.0]), ("pyzmq DEALER/ROUTER, no tensor", 64, [40.0, 80.0]))
    assert measure_ratio(ratio, run) == Measured(1.25, 0.0)
    assert measure_ratio(ratio, latency_run(("zmq, in place", 64, [50.0]))) is None


def test_the_best_of_each_side_is_compared() -> None:
    """At every size that was measured."""
    run = latency_run(
        ("doorbell + spin, in place", 64, [10.0]),
        ("zmq, in place", 64, [50.0]),
        ("kickmsg polling, in place", 64, [5.0]),
        ("multiprocessing.Pipe", 64, [20.0]),
    )
    reached = {one.title: one.reached for one in targets(run, None)}
    assert reached["best of ours / best of all others, 64 B"] == 2.0
    assert reached["doorbell + spin, in place / best polling peer, 64 B"] == 2.0
    assert reached["zmq, 64 B / raw DEALER/ROUTER"] is None


def test_the_baselines_targets_are_scaled_to_the_machine() -> None:
    """The target of 2 ms is for a machine on which raw pyzmq takes 90 µs."""
    latency = latency_run(("pyzmq REQ/REP, no tensor", 64, [45.0]))
    reached = {one.title: one.reached for one in targets(latency, baseline_run())}
    assert reached["baseline, float32, doorbell + spin, in place: ms, were raw pyzmq at 90 µs"] == pytest.approx(2.0)
    assert reached["the same / the original"] == pytest.approx(1 / 20_000)
    assert reached["baseline, float32, copy in / memcpy of the same bytes"] == pytest.approx(1.2)
