"""The tables of latency, throughput and baseline runs, of the contenders, and of the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..baseline.measure import ORIGINAL_PROFILE
from ..contenders import CONTENDERS
from ..harness.results import BaselineRow, BaselineRun, LatencyRun, ThroughputRun
from .grid import Grid, size_text, time_text
from .ratios import Target


def latency_grids(run: LatencyRun) -> Iterator[Grid]:
    """A table for each size."""
    header = ("contender", "copies", "calls", "min", "p50", "p99", "client cores", "server cores")
    for nbytes in sorted({row.nbytes for row in run.rows}):
        rows = [
            (
                row.contender,
                run.contenders[row.contender].copies.partition(":")[0],
                str(row.calls),
                *(time_text(us) for us in (row.min_us, row.p50_us, row.p99_us)),
                f"{row.client_cores:.2f}",
                f"{row.server_cores:.2f}",
            )
            for row in run.rows
            if row.nbytes == nbytes
        ]
        yield Grid(f"round trip, {size_text(nbytes)} each way", header, rows)


def overview_grid(run: LatencyRun) -> Grid:
    """Medians by size, and the busy cores, which show who spins."""
    sizes = sorted({row.nbytes for row in run.rows})
    rows_of = {(row.contender, row.nbytes): row for row in run.rows}
    rows = []
    for name in run.contenders:
        first = next((row for row in run.rows if row.contender == name), None)
        if first is None:
            continue
        medians = [time_text(rows_of[name, size].p50_us) if (name, size) in rows_of else "" for size in sizes]
        idle = run.idle_cores.get(name)
        busy = f"{first.client_cores:.2f} + {first.server_cores:.2f}"
        rows.append((name, *medians, busy, f"{idle[0]:.2f} + {idle[1]:.2f}" if idle else ""))
    header = ("p50", *(size_text(size) for size in sizes), "cores, 64 B calls", "cores, idle")
    return Grid("round trip by size; busy cores of client + server", header, rows)


def method_grid() -> Grid:
    """How each contender is used; needs no run."""
    header = ("contender", "used", "copies a round trip", "the reply is")
    rows = [(name, one.how, one.copies, one.reply) for name, one in CONTENDERS.items()]
    return Grid("contenders", header, rows, frozenset(header))


def throughput_grid(run: ThroughputRun) -> Grid:
    """Calls and bytes per second."""
    header = ("contender", "size", "in flight", "calls/s", "GB/s both ways", "client cores", "server cores")
    rows = [
        (
            row.contender,
            size_text(row.nbytes),
            str(row.in_flight),
            f"{row.calls_per_s:.0f}",
            f"{row.bytes_per_s / 1e9:.2f}",
            f"{row.client_cores:.2f}",
            f"{row.server_cores:.2f}",
        )
        for row in run.rows
    ]
    return Grid("throughput", header, rows)


def skipped_grids(skipped: Mapping[str, str]) -> list[Grid]:
    """Which contenders did not take part, and why."""
    return [Grid("skipped", ("contender", "why"), list(skipped.items()), frozenset(("why",)))] if skipped else []


def baseline_grids(run: BaselineRun) -> Iterator[Grid]:
    """A table for each call pattern and dtype, with the columns of the original's profile."""
    header = (
        "way",
        "calls",
        "RPC ms/call",
        "serialise ms/call",
        "deserialise ms/call",
        "MiB through ZeroMQ",
        "MiB through shared memory",
        "total",
        "best",
    )
    for pattern, dtype in dict.fromkeys((row.pattern, row.dtype) for row in run.rows):
        rows = [_baseline_cells(row) for row in run.rows if (row.pattern, row.dtype) == (pattern, dtype)]
        if (pattern, dtype) == (ORIGINAL_PROFILE.pattern, ORIGINAL_PROFILE.dtype):
            rows.insert(0, _baseline_cells(ORIGINAL_PROFILE))
        yield Grid(f"forward of 1024 tokens, transport only: {pattern}, {dtype}", header, rows)


def _baseline_cells(row: BaselineRow) -> tuple[str, ...]:
    parts = (row.rpc_ms_per_call, row.serialise_ms_per_call, row.deserialise_ms_per_call)
    return (
        row.contender,
        str(row.calls),
        *(f"{part:.3g}" for part in parts),
        f"{row.zmq_mib:.3g}" if row.zmq_mib < 1 else f"{row.zmq_mib:.1f}",
        f"{row.shm_mib:.1f}",
        time_text(row.total_ms * 1e3),
        time_text(row.min_total_ms * 1e3),
    )


def target_grid(found: list[Target]) -> Grid:
    """The targets, and what was reached."""
    header = ("target", "at most", "reached", "noise", "met")
    rows = []
    for one in found:
        if one.reached is None:
            rows.append((one.title, f"{one.limit:.4g}", "not measured", "", ""))
        else:
            met = "yes" if one.reached <= one.limit else "no"
            rows.append((one.title, f"{one.limit:.4g}", f"{one.reached:.4g}", f"± {one.noise / 2:.0%}", met))
    return Grid("targets, as ratios of medians from one run", header, rows)
