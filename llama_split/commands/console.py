"""What all commands share in talking to their user: notices, errors of one line, progress, the transport's table."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..errors import LlamaSplitError

if TYPE_CHECKING:
    from shmtransport import Statistics

    from ..checkpoint import Progress as OnProgress

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

notices = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False)


def notice(line: str) -> None:
    """Tell the user something that is no result."""
    notices.print(line, style="yellow", markup=False)


def print_error(text: str) -> None:
    """Say in one line what is wrong."""
    notices.print(f"error: {' '.join(text.split())}", style="red", markup=False)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object as one line, at once even into a pipe."""
    print(json.dumps(value), flush=True)


def log(verbose: bool) -> None:
    """Send the log to standard error: all that happens, or only what a user should know, as that a worker was lost."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(process)d %(name)s: %(message)s"
    )


def statistics_table(statistics: Statistics) -> Table:
    """What the transport did."""
    table = Table(title="transport", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in statistics.rows():
        table.add_row(*row)
    return table


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[OnProgress]:
    """A progress bar on the terminal, as a function to call with how many are done, of how many."""
    with Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        console=notices,
        transient=True,
        disable=not notices.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        notices.print("interrupted", markup=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        from shmtransport import TransportError  # imports torch: not before there is an error

        if not isinstance(error, (LlamaSplitError, TransportError, OSError, MemoryError)):
            raise
        print_error(str(error) or type(error).__name__)
        raise typer.Exit(EXIT_ERROR) from None
