"""The command line: ``shmtransport doctor``, ``shmtransport ls`` and ``shmtransport clean``.

This module only prints what ``doctor`` and ``leftovers`` find. An error that a user can fix is one line on standard
error, with exit code 2.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import TransportError
from ..memory import leftovers
from ..memory.leftovers import SharedObject
from ..text import printable
from ..units import size_text, time_text
from ..version import VERSION
from .connections import Connections, connections
from .facts import ConnectedSegments, Limit, MachineFacts

if TYPE_CHECKING:
    from .doctor import Verdict
    from .measure import ServerFacts

EXIT_PROBLEM = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_NO_CONNECTION = "no connection of this user is in use"

app = typer.Typer(
    help="Look after tensors in shared memory: what is in use, what is left over, how fast it is.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
notices = Console(stderr=True, highlight=False, soft_wrap=True)
console = Console(highlight=False, soft_wrap=True)

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

    with _one_line_errors():
        with notices.status("measuring") if address is not None else contextlib.nullcontext():
            facts = diagnosis.examine(address)
        found = diagnosis.verdicts(facts)
        if as_json:
            _print_json(diagnosis.report(facts))
        else:
            _print_machine(facts.machine)
            if facts.server is not None:
                _print_server(facts.server)
            _print_verdicts(found)
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
            console.print(_connections_table(connected))
        else:
            console.print(_NO_CONNECTION)
        if found:
            console.print(_objects_table(found))
        else:
            console.print("this user has no named objects in /dev/shm")


@app.command()
def clean(as_json: JsonOption = False) -> None:
    """Remove what this user's dead processes have left in /dev/shm; nothing of a living one."""
    with _one_line_errors():
        removed = leftovers.remove_dead()
        if as_json:
            _print_json({"removed": [_plain(one) for one in removed]})
            return
        for one in removed:
            console.print(f"removed segment {one.name} ({size_text(one.nbytes)})")
        console.print(f"removed {leftovers.in_words(removed)}" if removed else "dead processes have left nothing")


def _print_verdicts(found: list[Verdict]) -> None:
    if all(verdict.level != "problem" for verdict in found):
        console.print("all is well", style="green")
    for verdict in found:
        console.print(
            printable(f"{verdict.level}: {verdict}"),
            style="red" if verdict.level == "problem" else "yellow",
            markup=False,
        )


def _print_machine(machine: MachineFacts) -> None:
    variables = "\n".join(f"{name}={value}" for name, value in machine.environment.items())
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "kernel": f"{machine.kernel}, {machine.cores} cores",
        "/dev/shm": f"{size_text(machine.shm_free_bytes)} free of {size_text(machine.shm_bytes)}",
        "huge pages": machine.huge_pages,
        "core": machine.core,
        "segment guards": "on" if machine.guarded else "off",
        "in use": _connected_text(machine.connected),
        "by name": _named_text(machine.named),
        "open files": _limit_text(machine.open_files),
        "locked memory": _limit_text(machine.locked_memory_bytes, in_bytes=True),
        "environment": variables or "no relevant variable is set",
    }
    console.print(_facts_table("machine", rows))


def _print_server(server: ServerFacts) -> None:
    rows = {"address": f"{server.address} ({server.scheme})"}
    if server.socket is not None:
        rows["socket"] = f"mode {server.socket.mode:04o}, in a directory of {server.socket.directory_mode:04o}"
        rows["listening"] = f"process {server.socket.listener_pid}: {server.socket.listener_command}"
    rows["answering"] = f"process {server.server_pid}: {server.server_command}"
    rows["arenas granted"] = f"{size_text(server.arena_bytes)} each way"
    first, second = server.first_touch_s_per_mib, server.second_touch_s_per_mib
    rows["filling an arena"] = f"{time_text(first)} per MiB the first time, {time_text(second)} the second"
    console.print(_facts_table("server", rows))
    console.print(_times_table(server))


def _times_table(server: ServerFacts) -> Table:
    """Build the table of median times by size and channel, with the bandwidth of the copies."""
    usable = [channel for channel in server.channels if not channel.error]
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title="median times", title_justify="left")
    table.add_column("tensor\neach way", no_wrap=True)
    for channel in usable:
        for title in ("copied", "in place"):
            spin = f"spin {channel.spin_us:g}" if channel.spin_us else ""
            table.add_column(f"{channel.channel}\n{spin}\n{title}", justify="right", no_wrap=True)
    table.add_column("zmq\ncopied\nGB/s", justify="right", no_wrap=True)
    trips = [cell for channel in usable for cell in (time_text(channel.round_trip_s), "")]
    table.add_row("none", *trips)
    for row in zip(*(channel.sizes for channel in usable), strict=False):
        times = [time_text(time_s) for one in row for time_s in (one.copied_s, one.in_place_s)]
        table.add_row(size_text(row[0].nbytes), *times, f"{row[0].copied_bytes_per_s / 1e9:.2f}")
    return table


def _objects_table(found: list[SharedObject]) -> Table:
    table = Table()
    for title in ("size", "age", "owner", "name"):
        table.add_column(title, justify="right" if title in ("size", "age") else "left", overflow="fold")
    for one in found:
        owner = "dead" if one.owner_pid is None else f"process {one.owner_pid}"
        if one.owner_pid is not None and one.owner_pid <= 0:
            owner = "alive, elsewhere"
        table.add_row(size_text(one.nbytes), f"{one.age_s:.0f} s", owner, one.name)
    return table


def _connections_table(connected: list[Connections]) -> Table:
    table = Table(title="connections", title_justify="left")
    for title in ("client", "server", "number", "size", "address"):
        table.add_column(title, justify="right" if title in ("number", "size") else "left", overflow="fold")
    for one in connected:
        known = (one.client_pid, one.server_pid)
        rest = ", ".join(str(process) for process in one.processes if process not in known)
        unknown = f"unknown ({rest})" if rest else "unknown"
        client, server = (unknown if process is None else f"process {process}" for process in known)
        places = printable(", ".join(one.addresses)) or "unknown"
        address = f"one of {places}" if len(one.addresses) > 1 else places
        table.add_row(client, server, str(one.count), size_text(one.nbytes), Text(address))
    return table


def _facts_table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(printable(value, keep="\n")))  # in a Text, brackets are no markup
    return table


def _named_text(named: tuple[SharedObject, ...]) -> str:
    dead = [one for one in named if one.dead]
    parts = [f"{len(named) - len(dead)} of living processes"] if len(dead) < len(named) else []
    return ", ".join([*parts, leftovers.in_words(dead)] if dead or not named else parts)


def _connected_text(connected: ConnectedSegments) -> str:
    if not connected.count:
        return _NO_CONNECTION
    processes = ", ".join(map(str, connected.processes))
    return f"connections: {connected.count} segments without a name ({size_text(connected.nbytes)}), in {processes}"


def _limit_text(limit: Limit, *, in_bytes: bool = False) -> str:
    def text(value: int | None) -> str:
        if value is None:
            return "unlimited"
        return size_text(value) if in_bytes else str(value)

    return f"{text(limit.soft)} (hard: {text(limit.hard)})"


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
        notices.print("interrupted", markup=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (TransportError, OSError) as error:
        notices.print(f"error: {printable(' '.join(str(error).split()))}", style="red", markup=False)
        raise typer.Exit(EXIT_ERROR) from None
