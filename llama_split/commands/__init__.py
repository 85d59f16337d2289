"""The command line: ``llama-split generate``, ``chat``, ``serve``, ``worker``, ``deal`` and ``info``.

Rules that its modules keep:

* torch and transformers are imported inside the commands, so that ``--help`` is quick, thread policies are set before
  torch starts, and a worker is started before this process imports them.
* Standard output is for results, standard error for everything else. Only the prompt of an interactive chat stands
  between its answers.
* What a user can fix is one line on standard error and exit code 2; an interruption is exit code 130.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from shmtransport.version import VERSION

from ..boundary.requirements import check_requirements
from ..errors import EXIT_ERROR, LlamaSplitError
from .chat import chat
from .console import print_error
from .deal import deal
from .generate import generate
from .info import info
from .serve import serve
from .worker import worker

app = typer.Typer(
    help="Split Llama inference: the prompt stays here, a worker multiplies.",
    add_completion=False,
    rich_markup_mode=None,  # rich's tables cut the names of options at 80 columns
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llama-split {VERSION}")
        raise typer.Exit


@app.callback()
def _before_a_command(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    check_requirements()  # not before --help


for _command in (generate, chat, serve, worker, deal, info):
    app.command()(_command)

# Typer may bring its own click or use the installed one, so this class is found through one of typer's.
_CLICK_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def run() -> NoReturn:
    """Run the command named by the process's arguments, and end the process."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="llama-split", standalone_mode=False)
    except _CLICK_ERROR as error:
        usage: Any = error
        context = getattr(usage, "ctx", None)
        path = "llama-split" if context is None else context.command_path
        print_error(f"{usage.format_message().rstrip('.')}; see {path} --help")
        code = EXIT_ERROR
    except LlamaSplitError as error:
        print_error(str(error))
        code = EXIT_ERROR
    except SystemExit as ending:  # a worker that was told to stop
        code = ending.code
    _end(code if isinstance(code, int) else 0)


def _end(code: int) -> NoReturn:
    """End the process; where torch was imported, without its teardown, which takes up to a second.

    By now a command has closed all that it opened.
    """
    if "torch" in sys.modules:
        try:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # the reader of a pipe has gone
            code = code or EXIT_ERROR
        os._exit(code)
    sys.exit(code)
