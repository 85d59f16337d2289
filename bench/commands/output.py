"""How a command shows a run on the terminal, and keeps it in files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console

from ..harness.results import EngineRun, Run, Setting, write
from ..reports.grid import Grid, setting_text, to_rich
from ..reports.tables import skipped_grids

_PIPE_WIDTH = 150  # for a log or a pipe


def show(about: Setting, grids: Iterable[Grid], skipped: Mapping[str, str] | None = None) -> None:
    """Print the setting of a run, its tables, and the contenders that were skipped.

    Args:
        about: Its setting.
        grids: Its tables.
        skipped: Reasons by contender.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    console.print(setting_text(about))
    for grid in (*grids, *skipped_grids(skipped or {})):
        console.print(to_rich(grid))


def keep(run: Run, json_file: Path | None, plot: Path | None = None) -> None:
    """Write a run into files.

    Args:
        run: The run.
        json_file: The file for its results; None for none.
        plot: The directory for its plot; None for none.
    """
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write(json_file, run)
    if plot is not None and not isinstance(run, EngineRun):
        from ..reports import plots  # matplotlib takes a second to import

        print(f"wrote {plots.plot(run, plot)}", file=sys.stderr)
