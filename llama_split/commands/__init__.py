"""The command line: ``llama-split generate``, ``chat``, ``worker`` and ``info``.

Rules that its modules keep:

* heavy imports happen inside the commands, so that ``--help`` is quick, thread policies are set before torch starts,
  and a worker of our own is started before this process imports anything;
* standard output is for results, standard error for everything else;
* whatever a user can mend is one line on standard error and exit code 2; an interruption is exit code 130.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from ..errors import LlamaSplitError
from ..requirements import check_requirements
from .chat import chat
from .console import EXIT_ERROR, print_error
from .generate import generate
from .info import info
from .worker import worker

app = typer.Typer(
    help="Split Llama inference: the prompt stays here, a worker multiplies.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(check_requirements)  # before a command, not before the list of them
for _command in (generate, chat, worker, info):
    app.command()(_command)

# Typer may bring a click of its own or use the installed one: the class is found by way of one that is typer's.
_CLICK_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def run() -> None:
    """Run the command that the process's arguments name, and end the process."""
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
    sys.exit(code)
