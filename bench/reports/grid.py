"""A table as plain text cells, for the terminal and for Markdown alike, and how figures are written in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from ..harness.results import Setting

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Grid:
    """A table; all columns but the first hold figures, except those named in ``words``."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: frozenset[str] = frozenset()


def to_rich(grid: Grid) -> Table:
    """The table for the terminal."""
    table = Table(title=grid.title, title_justify="left", expand=False)
    for place, name in enumerate(grid.header):
        table.add_column(name, justify="left" if _is_left(grid, place) else "right")
    for row in grid.rows:
        table.add_row(*row)
    return table


def to_markdown(grid: Grid) -> str:
    """The table for a document."""
    lines = [f"**{grid.title}**", "", _line(grid.header)]
    lines.append(_line("---" if _is_left(grid, place) else "---:" for place in range(len(grid.header))))
    lines += [_line(row) for row in grid.rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _is_left(grid: Grid, place: int) -> bool:
    return place == 0 or grid.header[place] in grid.words


def setting_text(setting: Setting) -> str:
    """Machine, versions and options on one line."""
    parts = (setting.machine, setting.versions, setting.options)
    return "; ".join(", ".join(f"{name} {value}" for name, value in one.items()) for one in parts)


def time_text(us: float) -> str:
    """Microseconds with three digits, in the unit that suits them."""
    for unit, factor in (("µs", 1.0), ("ms", 1e3)):
        if us / factor < 999.5:
            return f"{us / factor:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def size_text(nbytes: int) -> str:
    """A size in the largest unit that divides it."""
    for unit, factor in (("MiB", MIB), ("KiB", KIB)):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"
