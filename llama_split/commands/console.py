"""How all commands talk to their user: notices, one-line errors, progress, JSON, the table of the transport."""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from shmtransport import TransportError
from shmtransport.text import printable

from ..errors import EXIT_ERROR, EXIT_INTERRUPTED, LlamaSplitError, missing_package

if TYPE_CHECKING:
    from shmtransport import Statistics

    from ..checkpoint import Progress as OnProgress

_READERS = ("transformers", "tokenizers", "safetensors", "gguf", "jinja2", "huggingface_hub")
_OURS = ("llama_split", "shmtransport")

notices = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False)


def notice(line: str) -> None:
    """Tell the user something that is not a result."""
    notices.print(line, style="yellow", markup=False)


def print_error(text: str) -> None:
    """Print an error as one line."""
    notices.print(f"error: {' '.join(text.split())}", style="red", markup=False)


def print_foreign_error(error: BaseException) -> None:
    """Print an error whose text may come from a peer or a file, with control characters made visible."""
    print_error(printable(str(error)) or type(error).__name__)


def print_json(value: dict[str, Any]) -> None:
    """Print a JSON object as one line, and flush: a reader at the other end of a pipe waits for it."""
    print(json.dumps(value), flush=True)


class _Lines(logging.Formatter):
    """Formats the log, with control characters from peers and files made visible."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        return printable(super().formatMessage(record), keep="\n")

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return printable(super().formatException(ei), keep="\n")


def log(verbose: bool) -> None:
    """Send the log to standard error: everything if ``verbose``, else only warnings, such as a lost worker."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(process)d %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def statistics_table(statistics: Statistics) -> Table:
    """The transport's counters as a table."""
    table = Table(title="transport", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in statistics.rows():
        table.add_row(*row)
    return table


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[OnProgress]:
    """Show a progress bar on a terminal; yields a function to call with how many are done, of how many."""
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
    """Turn what a user can fix into one line and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        notices.print("interrupted", markup=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (SystemExit, typer.Exit):
        raise
    except BaseException as error:  # a panic in the tokenizer's Rust code is no Exception
        explained = _explained(error)
        if explained is None:
            raise
        print_foreign_error(explained)
        raise typer.Exit(EXIT_ERROR) from None


def _explained(error: BaseException) -> BaseException | None:
    """The error as the user should see it; None if it is a bug in this program."""
    if isinstance(error, ModuleNotFoundError) and (missing := missing_package(error)) is not None:
        return missing
    if isinstance(error, (LlamaSplitError, TransportError, OSError, MemoryError)):
        return error
    if is_of_the_model(error):
        logging.getLogger("llama_split").info("where it was raised", exc_info=error)
        return LlamaSplitError(
            f"transformers can't do this with this model and these options: {type(error).__name__}: {error}"
        )
    return None


def is_of_the_model(error: BaseException) -> bool:
    """True if a library raised the error while it worked with a model's files.

    The innermost frame that belongs either to this project or to a library that reads such files decides. Libraries
    raise anything when a file is wrong; an error from this project's own code is a bug and keeps its traceback.
    """
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [package for name in frames if (package := name.partition(".")[0]) in (*_READERS, *_OURS)]
    return bool(packages) and packages[-1] in _READERS
