"""Statistics: frozen totals that print as a table."""

from __future__ import annotations

import dataclasses
import sys
import threading

import pytest

from shmtransport import statistics
from shmtransport.statistics import Counters, Statistics
from tests.support.interruptions import interruptions


def test_a_snapshot_has_every_counter() -> None:
    """Each counter appears under its own name in the snapshot."""
    counters = Counters()
    names = [field.name for field in dataclasses.fields(Statistics)]
    assert set(names) - {"latency_histogram"} == set(vars(counters)) - {"_latencies", "_unsorted"}
    names.remove("latency_histogram")
    for number, name in enumerate(names, start=1):
        setattr(counters, name, number)
    assert dataclasses.astuple(counters.snapshot()) == (*range(1, len(names) + 1), ())


def test_new_counters_are_zero() -> None:
    """Nothing has happened yet."""
    assert Counters().snapshot() == Statistics()
    assert not any(dataclasses.astuple(Statistics()))


def test_a_snapshot_does_not_change() -> None:
    """A snapshot is frozen: neither later calls nor its reader change it."""
    counters = Counters()
    before = counters.snapshot()
    counters.count_call(0.5)
    assert (before.calls, counters.snapshot().calls) == (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.calls = 5  # type: ignore[misc]


def _count_everything(counters: Counters) -> None:
    counters.count_sent(100, 0.5, 3, 1000, 2, 600)
    counters.count_received(10, 20, 0.25)
    counters.count_call(1.0, failed=True)
    counters.count_failure()
    counters.count_in_flight(2)
    counters.count_wait()
    counters.count_stall()
    counters.count_stalled(0.125)


def test_what_is_counted_in_the_middle_of_counting_is_counted_too() -> None:
    """By a signal handler or a finalizer, at each place where one may run; latencies also while they are sorted."""
    for interruption in interruptions(statistics):
        counters = Counters()
        for _ in range(4095):
            counters.count_call(1.0)

        def inner(counters: Counters = counters) -> None:
            _count_everything(counters)
            assert counters.latency_histogram

        interruption.during(lambda counters=counters: _count_everything(counters), inner)  # type: ignore[misc]
        times = 2 if interruption.where else 1
        expected = Statistics(
            calls=4095 + times,
            failures=2 * times,
            call_seconds=4095.0 + times,
            serialize_seconds=0.5 * times,
            deserialize_seconds=0.25 * times,
            tensor_bytes_sent=1000 * times,
            tensor_bytes_received=20 * times,
            control_bytes_sent=100 * times,
            control_bytes_received=10 * times,
            bytes_copied=600 * times,
            tensors_copied=2 * times,
            tensors_sent=3 * times,
            waits=times,
            stalls=times,
            stall_seconds=0.125 * times,
            in_flight_peak=2,
        )
        snapshot = counters.snapshot()
        assert dataclasses.replace(snapshot, latency_histogram=()) == expected, interruption.where
        assert [count for _, count in snapshot.latency_histogram] == [4095 + times], interruption.where


def test_threads_may_count_at_once() -> None:
    """None of their counts is lost."""
    counters = Counters()
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
    snapshot = counters.snapshot()
    assert (snapshot.calls, snapshot.call_seconds) == (80_000, 80_000.0)
    assert sum(count for _, count in snapshot.latency_histogram) == 80_000


def test_times_are_printed_per_call_and_bytes_in_total() -> None:
    """98 calls of 332.5 ms print as 332.5 ms/call; bytes print as MiB, control bytes as KiB."""
    statistics = Statistics(
        calls=98,
        call_seconds=98 * 0.3325,
        serialize_seconds=98 * 0.00001,
        tensor_bytes_sent=3328 << 20,
        tensor_bytes_received=(3656 << 20) + (1 << 19),
        control_bytes_sent=2560,
    )
    rows = dict(statistics.rows())
    assert rows["calls"] == "98"
    assert rows["time"] == "332.500 ms/call"
    assert rows["serialise"] == "0.010 ms/call"
    assert rows["tensors sent"] == "3328.0 MiB"
    assert rows["tensors received"] == "3656.5 MiB"
    assert rows["control sent"] == "2.5 KiB"


def test_no_calls_print_without_a_division_by_zero() -> None:
    """Statistics of an unused client print."""
    assert dict(Statistics().rows())["time"] == "0.000 ms/call"


def test_the_table_has_aligned_columns() -> None:
    """A line for each row, all of one length: titles begin in the first column, values end in the last."""
    statistics = Statistics(calls=123456, tensor_bytes_sent=1 << 40)
    lines = str(statistics).split("\n")
    assert len({len(line) for line in lines}) == 1
    for line, (title, value) in zip(lines, statistics.rows(), strict=True):
        assert line.startswith(f"{title} ")
        assert line.endswith(f" {value}")
