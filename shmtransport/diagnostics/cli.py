"""The command line: ``shmtransport doctor``, ``shmtransport ls`` and ``shmtransport clean``.

This module only prints what ``doctor`` and ``leftovers`` find; ``tables`` has the tables. An error that a user can
fix is one line on standard error, with exit code 2.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..errors import TransportError
from ..memory import leftovers
from ..memory.leftovers import SharedObject
from ..text import printable
from ..units import size_text
from ..version import VERSION
from .connections import NO_CONNECTION, connections

EXIT_PROBLEM = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="Look after tensors in shared memory: what is in use, what is left over, how fast it is.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shmtransport {VERSION}")
        raise typer.Exit


@app.callback()
def _with_version(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Argument(help="Address of a server to examine and measure, for example ipc:///tmp/worker.ipc."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Examine this machine and, with an address, measure the server there; say what to fix.

    Measuring makes the server answer several thousand calls, for up to 15 seconds. The exit code is 1 if there is a
    problem to fix.
    """
    from . import doctor as diagnosis  # which imports torch
    from . import tables

    with _one_line_errors():
        with tables.measuring() if address is not None else contextlib.nullcontext():
            facts = diagnosis.examine(address)
        found = diagnosis.verdicts(facts)
        if as_json:
            _print_json(diagnosis.report(facts))
        else:
            tables.print_machine(facts.machine)
            if facts.server is not None:
                tables.print_server(facts.server)
            tables.print_verdicts(found)
    if diagnosis.has_problem(found):
        raise typer.Exit(EXIT_PROBLEM)


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """List this user's connections, and its segments in /dev/shm, of living and of dead processes."""
    with _one_line_errors():
        found, connected = leftovers.list_all(), connections()
        if as_json:
            _print_json({"objects": [_plain(one) for one in found], "connections": [asdict(one) for one in connected]})
            return
        if connected:
            from .tables import print_connections

            print_connections(connected)
        else:
            typer.echo(NO_CONNECTION)
        if found:
            from .tables import print_objects

            print_objects(found)
        else:
            typer.echo("this user has no named objects in /dev/shm")


@app.command()
def clean(as_json: JsonOption = False) -> None:
    """Remove what this user's dead processes have left in /dev/shm; nothing of a living one."""
    with _one_line_errors():
        removed = leftovers.remove_dead()
        if as_json:
            _print_json({"removed": [_plain(one) for one in removed]})
            return
        for one in removed:
            typer.echo(f"removed segment {one.name} ({size_text(one.nbytes)})")
        typer.echo(f"removed {leftovers.in_words(removed)}" if removed else "dead processes have left nothing")


def _plain(one: SharedObject) -> dict[str, Any]:
    return {**asdict(one), "dead": one.dead}


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=1))


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn an error that a user can fix into one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (TransportError, OSError) as error:
        typer.secho(f"error: {printable(' '.join(str(error).split()))}", fg="red", err=True)
        raise typer.Exit(EXIT_ERROR) from None
