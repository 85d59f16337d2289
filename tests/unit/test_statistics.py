"""Statistics: frozen totals that print as a table."""

from __future__ import annotations

import dataclasses

import pytest

from shmtransport.core import Counters
from shmtransport.statistics import Statistics


def test_a_snapshot_has_every_counter() -> None:
    """Each counter appears under its own name in the snapshot; a server adds those of its GPU."""
    counters = Counters()
    elsewhere = {"latency_histogram", "pinned_copies", "bounced_copies"}
    names = [field.name for field in dataclasses.fields(Statistics) if field.name not in elsewhere]
    for number, name in enumerate(names, start=1):
        setattr(counters, name, number)
    found = Statistics.of(counters)
    assert [getattr(found, name) for name in names] == [*range(1, len(names) + 1)]


def test_new_counters_are_zero() -> None:
    """Nothing has happened yet."""
    assert Statistics.of(Counters()) == Statistics()
    assert not any(dataclasses.astuple(Statistics()))


def test_a_snapshot_does_not_change() -> None:
    """A snapshot is frozen: neither later calls nor its reader change it."""
    counters = Counters()
    before = Statistics.of(counters)
    counters.count_call(0.5)
    assert (before.calls, Statistics.of(counters).calls) == (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.calls = 5  # type: ignore[misc]


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
