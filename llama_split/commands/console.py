"""What all commands share in talking to their user: notices, errors of one line, progress, the transport's table."""

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

from ..errors import LlamaSplitError, missing_package

if TYPE_CHECKING:
    from shmtransport import Statistics

    from ..checkpoint import Progress as OnProgress

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_READERS = ("transformers", "tokenizers", "safetensors", "gguf", "jinja2", "huggingface_hub")
_OURS = ("llama_split", "shmtransport")

notices = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False)


def notice(line: str) -> None:
    """Tell the user something that is no result."""
    notices.print(line, style="yellow", markup=False)


def print_error(text: str) -> None:
    """Say in one line what is wrong."""
    notices.print(f"error: {' '.join(text.split())}", style="red", markup=False)


def print_foreign_error(error: BaseException) -> None:
    """The same of an error whose text may have come from a peer or a file."""
    from shmtransport.text import printable  # imports torch: not before there is an error

    print_error(printable(str(error)) or type(error).__name__)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object as one line, at once even into a pipe."""
    print(json.dumps(value), flush=True)


class _Lines(logging.Formatter):
    """Lines of the log, with what peers and files say made printable."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        from shmtransport.text import printable

        return printable(super().formatMessage(record), keep="\n")

    def formatException(self, ei: Any) -> str:  # noqa: N802
        from shmtransport.text import printable

        return printable(super().formatException(ei), keep="\n")


def log(verbose: bool) -> None:
    """Send the log to standard error: all that happens, or only what a user should know, as that a worker was lost."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(process)d %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


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
    except (SystemExit, typer.Exit):
        raise
    except BaseException as error:  # a panic of the tokenizer's is no Exception
        told = _in_words(error)
        if told is None:
            raise
        print_foreign_error(told)
        raise typer.Exit(EXIT_ERROR) from None


def _in_words(error: BaseException) -> BaseException | None:
    """An error with words for the user; None if it is a mistake of ours."""
    from shmtransport import TransportError  # imports torch: not before there is an error

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
    """Whether an error was raised while a library worked with a model's files, and not where it had called us back.

    The innermost frame of a package decides that is this project's or one of those that read such files. They raise
    whatever a wrong file leads them to; what is raised in our own code is a mistake of ours and keeps its traceback.
    """
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [package for name in frames if (package := name.partition(".")[0]) in (*_READERS, *_OURS)]
    return bool(packages) and packages[-1] in _READERS
