"""Tables as plain text cells, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from .contenders import CONTENDERS
from .ratios import Target, size_text
from .results import LatencyRun, SeedRow, SeedRun, Setting, ThroughputRun
from .seed import DOCUMENT


@dataclass(frozen=True)
class Grid:
    """A table; all columns but the first are figures unless ``words`` names them."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: frozenset[str] = frozenset()


def to_rich(grid: Grid) -> Table:
    """For the terminal."""
    table = Table(title=grid.title, title_justify="left", expand=False)
    for place, name in enumerate(grid.header):
        table.add_column(name, justify="left" if _is_left(grid, place) else "right")
    for row in grid.rows:
        table.add_row(*row)
    return table


def to_markdown(grid: Grid) -> str:
    """For a document."""
    lines = [f"**{grid.title}**", "", _line(grid.header)]
    lines.append(_line("---" if _is_left(grid, place) else "---:" for place in range(len(grid.header))))
    lines += [_line(row) for row in grid.rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _is_left(grid: Grid, place: int) -> bool:
    return place == 0 or grid.header[place] in grid.words


def setting_text(setting: Setting) -> str:
    """Machine, versions and options in a line."""
    parts = (setting.machine, setting.versions, setting.options)
    return "; ".join(", ".join(f"{name} {value}" for name, value in one.items()) for one in parts)


def time_text(us: float) -> str:
    """Microseconds with three digits, in the unit that suits them."""
    for unit, factor in (("µs", 1.0), ("ms", 1e3)):
        if us / factor < 999.5:
            return f"{us / factor:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def latency_grids(run: LatencyRun) -> Iterator[Grid]:
    """One for each size."""
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
    """Medians by size, and who spins."""
    sizes = sorted({row.nbytes for row in run.rows})
    rows_of = {(row.contender, row.nbytes): row for row in run.rows}
    rows = []
    for name in CONTENDERS:
        if not any(row.contender == name for row in run.rows):
            continue
        first = next(row for row in run.rows if row.contender == name)
        medians = [time_text(rows_of[name, size].p50_us) if (name, size) in rows_of else "" for size in sizes]
        idle = run.idle_cores.get(name)
        busy = f"{first.client_cores:.2f} + {first.server_cores:.2f}"
        rows.append((name, *medians, busy, f"{idle[0]:.2f} + {idle[1]:.2f}" if idle else ""))
    header = ("p50", *(size_text(size) for size in sizes), "cores, 64 B calls", "cores, idle")
    return Grid("round trip by size; busy cores of client + server", header, rows)


def method_grid() -> Grid:
    """How each contender is used; needs no run."""
    header = ("contender", "used", "copies a round trip", "the reply is")
    rows = [(name, kind.how, kind.copies, kind.reply) for name, kind in CONTENDERS.items()]
    return Grid("contenders", header, rows, frozenset(header))


def throughput_grid(run: ThroughputRun) -> Grid:
    """Calls and bytes a second."""
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


def skipped_grid(skipped: dict[str, str]) -> Grid:
    """Who did not take part, and why."""
    return Grid("skipped", ("contender", "why"), list(skipped.items()), frozenset(("why",)))


def seed_grids(run: SeedRun) -> Iterator[Grid]:
    """One for each call pattern and dtype, in the form of the original's table."""
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
        rows = [_seed_cells(row) for row in run.rows if (row.pattern, row.dtype) == (pattern, dtype)]
        if (pattern, dtype) == (DOCUMENT.pattern, DOCUMENT.dtype):
            rows.insert(0, _seed_cells(DOCUMENT))
        yield Grid(f"forward of 1024 tokens, transport only: {pattern}, {dtype}", header, rows)


def _seed_cells(row: SeedRow) -> tuple[str, ...]:
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
    """Targets and what was reached."""
    header = ("target", "at most", "reached", "noise", "met")
    rows = []
    for one in found:
        if one.reached is None:
            rows.append((one.title, f"{one.limit:.4g}", "not measured", "", ""))
        else:
            met = "yes" if one.reached <= one.limit else "no"
            rows.append((one.title, f"{one.limit:.4g}", f"{one.reached:.4g}", f"± {one.noise / 2:.0%}", met))
    return Grid("targets, as quotients of medians of one run", header, rows)
