"""Counters: what is counted in one twin is counted in the other, by any thread and in the middle of counting."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmtransport.core import counters as python_counters
from shmtransport.core.counters import range_of
from shmtransport.statistics import LATENCY_RANGES, RANGES_PER_OCTAVE, SHORTEST_S
from tests.support.cores import native_twin, needs_native, python_twin
from tests.support.interruptions import interruptions

TOTALS = {
    "calls": 1,
    "failures": 2,
    "call_seconds": 1.0,
    "serialize_seconds": 0.5,
    "deserialize_seconds": 0.25,
    "tensor_bytes_sent": 1000,
    "tensor_bytes_received": 20,
    "control_bytes_sent": 100,
    "control_bytes_received": 10,
    "bytes_copied": 600,
    "tensors_copied": 2,
    "tensors_sent": 3,
    "waits": 1,
    "stalls": 1,
    "stall_seconds": 0.125,
}


def _count_everything(counters: Any) -> None:
    counters.count_sent(100, 0.5, 3, 1000, 2, 600)
    counters.count_received(10, 20, 0.25)
    counters.count_call(1.0, failed=True)
    counters.count_failure()
    counters.count_in_flight(2)
    counters.count_wait()
    counters.count_stall()
    counters.count_stalled(0.125)


def test_each_event_counts_where_it_belongs(core: ModuleType) -> None:
    """Totals add up, the peak is the largest; what is left out counts nothing."""
    counters = core.Counters()
    assert all(getattr(counters, name) == 0 for name in (*TOTALS, "in_flight_peak"))
    for times in (1, 2, 3):
        _count_everything(counters)
        assert {name: getattr(counters, name) for name in TOTALS} == {name: times * one for name, one in TOTALS.items()}
    counters.count_in_flight(1)
    assert counters.in_flight_peak == 2
    counters.count_sent(1)
    assert (counters.control_bytes_sent, counters.tensors_sent) == (301, 9)
    assert sum(counters.latencies()) == 3


@needs_native
@given(st.lists(st.floats(0.0, 1e5) | st.sampled_from([-1.0, 0.0, 1e-6, 1e-9, 1e300, float("inf")]), max_size=30))
def test_both_twins_count_a_time_in_the_same_range(times: list[float]) -> None:
    """The range whose bounds it lies between; the first and the last take what lies beyond."""
    found = []
    for core in (python_twin, native_twin):
        assert core is not None
        counters = core.Counters()
        for seconds in times:
            counters.count_call(seconds)
        found.append(counters.latencies())
    assert all(latencies == found[0] for latencies in found)
    for seconds in times:
        index = range_of(seconds)
        assert found[0][index]
        assert index == LATENCY_RANGES - 1 or seconds <= SHORTEST_S * 2 ** ((index + 1) / RANGES_PER_OCTAVE) * (
            1 + 1e-9
        )
        assert index == 0 or seconds >= SHORTEST_S * 2 ** (index / RANGES_PER_OCTAVE) * (1 - 1e-9)


def test_what_is_counted_in_the_middle_of_counting_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal handler or a finalizer, at each place where one may run; latencies also while they are sorted."""
    monkeypatch.setattr(python_counters, "_UNSORTED_LIMIT", 4)
    for interruption in interruptions(python_counters):
        counters = python_counters.Counters()
        for _ in range(3):
            counters.count_call(1.0)

        def inner(counters: python_counters.Counters = counters) -> None:
            _count_everything(counters)
            assert any(counters.latencies())

        interruption.during(lambda counters=counters: _count_everything(counters), inner)  # type: ignore[misc]
        times = 2 if interruption.where else 1
        expected = {name: times * one for name, one in TOTALS.items()}
        expected["calls"] += 3
        expected["call_seconds"] += 3.0
        assert {name: getattr(counters, name) for name in TOTALS} == expected, interruption.where
        assert sum(counters.latencies()) == 3 + times, interruption.where


def test_threads_may_count_at_once(core: ModuleType) -> None:
    """None of their counts is lost."""
    counters = core.Counters()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [counters.count_call(1.0) for _ in range(20_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (counters.calls, counters.call_seconds) == (80_000, 80_000.0)
    assert sum(counters.latencies()) == 80_000


def test_a_count_is_a_number(core: ModuleType) -> None:
    """Anything else is a TypeError, with nothing counted."""
    counters = core.Counters()
    for wrong in (None, "1", [1]):
        with pytest.raises(TypeError):
            counters.count_stalled(wrong)
        with pytest.raises(TypeError):
            counters.count_received(wrong, 1, 0.5)
    assert counters.stall_seconds == 0
