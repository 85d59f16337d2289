"""The command line: ``shmtransport doctor``, ``shmtransport ls`` and ``shmtransport clean``.

Only prints: what is found comes from ``doctor`` and ``leftovers``. Whatever a user can mend is one line on standard
error and exit code 2.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import doctor as diagnosis
from . import leftovers
from .errors import TransportError
from .facts import ConnectedSegments, Limit, MachineFacts, connected_segments
from .leftovers import SharedObject
from .measure import ServerFacts
from .text import printable
from .units import size_text

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="Look after tensors in shared memory: what is in use, what is left over, how fast it is.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
notices = Console(stderr=True, highlight=False, soft_wrap=True)
console = Console(highlight=False, soft_wrap=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Argument(help="A server to look at and to measure, as ipc:///tmp/worker.ipc.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is in use on this machine and, with an address, how fast the server there is: what to mend, and how.

    Measuring makes the server answer some thousand calls, for up to 15 seconds.
    """
    with _one_line_errors():
        with notices.status("measuring") if address is not None else contextlib.nullcontext():
            facts = diagnosis.examine(address)
        if as_json:
            _print_json(diagnosis.report(facts))
            return
        _print_machine(facts.machine)
        if facts.server is not None:
            _print_server(facts.server)
        found = diagnosis.verdicts(facts)
        if not diagnosis.has_problem(found):
            console.print("all is well", style="green")
        for verdict in found:
            console.print(
                printable(f"{verdict.level}: {verdict}"),
                style="red" if verdict.level == "problem" else "yellow",
                markup=False,
            )


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """Show this user's segments and bells in /dev/shm, of the living and of the dead."""
    with _one_line_errors():
        found, connected = leftovers.list_all(), connected_segments()
        if as_json:
            _print_json({"objects": [_plain(one) for one in found], "connected": asdict(connected)})
            return
        if found:
            console.print(_objects_table(found))
        else:
            console.print("nothing of this user has a name in /dev/shm")
        console.print(_connected_text(connected))


@app.command()
def clean(as_json: JsonOption = False) -> None:
    """Remove from /dev/shm what dead processes of this user have left there, and nothing that a living one holds."""
    with _one_line_errors():
        removed = leftovers.remove_dead()
        if as_json:
            _print_json({"removed": [_plain(one) for one in removed]})
            return
        for one in removed:
            console.print(f"removed {one.kind} {one.name} ({size_text(one.nbytes)})")
        console.print(f"removed {leftovers.in_words(removed)}" if removed else "dead processes have left nothing")


def _print_machine(machine: MachineFacts) -> None:
    variables = "\n".join(f"{name}={value}" for name, value in machine.environment.items())
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "kernel": f"{machine.kernel}, {machine.cores} cores",
        "/dev/shm": f"{size_text(machine.shm_free_bytes)} free of {size_text(machine.shm_bytes)}",
        "huge pages": machine.huge_pages,
        "in use": _connected_text(machine.connected),
        "by name": _named_text(machine.named),
        "open files": _limit_text(machine.open_files),
        "locked memory": _limit_text(machine.locked_memory_bytes, in_bytes=True),
        "environment": variables or "nothing that overrides anything",
    }
    console.print(_facts_table("machine", rows))


def _print_server(server: ServerFacts) -> None:
    rows = {"address": f"{server.address}, so {server.transport}"}
    if server.socket is not None:
        rows["socket"] = f"mode {server.socket.mode:04o}, in a directory of {server.socket.directory_mode:04o}"
        rows["listening"] = f"process {server.socket.listener_pid}: {server.socket.listener_command}"
    rows["answering"] = f"process {server.server_pid}: {server.server_command}"
    rows["arenas granted"] = f"{size_text(server.arena_bytes)} each way"
    first, second = server.first_touch_s_per_mib, server.second_touch_s_per_mib
    rows["filling an arena"] = (
        f"{diagnosis.time_text(first)} a MiB the first time, {diagnosis.time_text(second)} the second"
    )
    console.print(_facts_table("server", rows))
    console.print(_times_table(server))


def _times_table(server: ServerFacts) -> Table:
    """Median times by size and channel, with the bandwidth of the copies."""
    usable = [channel for channel in server.channels if not channel.error]
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title="median times", title_justify="left")
    table.add_column("tensor\neach way", no_wrap=True)
    for channel in usable:
        for title in ("copied", "in place"):
            spin = f"spin {channel.spin_us:g}" if channel.spin_us else ""
            table.add_column(f"{channel.channel}\n{spin}\n{title}", justify="right", no_wrap=True)
    table.add_column("zmq\ncopied\nGB/s", justify="right", no_wrap=True)
    trips = [cell for channel in usable for cell in (diagnosis.time_text(channel.round_trip_s), "")]
    table.add_row("none", *trips)
    for row in zip(*(channel.sizes for channel in usable), strict=False):
        times = [diagnosis.time_text(time_s) for one in row for time_s in (one.copied_s, one.in_place_s)]
        table.add_row(size_text(row[0].nbytes), *times, f"{row[0].copied_bytes_per_s / 1e9:.2f}")
    return table


def _objects_table(found: list[SharedObject]) -> Table:
    table = Table()
    for title in ("kind", "size", "age", "owner", "name"):
        table.add_column(title, justify="right" if title in ("size", "age") else "left", overflow="fold")
    for one in found:
        owner = "dead" if one.owner_pid is None else f"process {one.owner_pid}"
        if one.owner_pid is not None and one.owner_pid <= 0:
            owner = "alive, elsewhere"
        table.add_row(one.kind, size_text(one.nbytes), f"{one.age_s:.0f} s", owner, one.name)
    return table


def _facts_table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(printable(value, keep="\n")))  # brackets in it are no markup
    return table


def _named_text(named: tuple[SharedObject, ...]) -> str:
    dead = [one for one in named if one.dead]
    parts = [f"{len(named) - len(dead)} of living processes"] if len(dead) < len(named) else []
    return ", ".join([*parts, leftovers.in_words(dead)] if dead or not named else parts)


def _connected_text(connected: ConnectedSegments) -> str:
    if not connected.count:
        return "no connection of this user is in use"
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
    """Turn what a user can mend into one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        notices.print("interrupted", markup=False)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (TransportError, OSError) as error:
        notices.print(f"error: {printable(' '.join(str(error).split()))}", style="red", markup=False)
        raise typer.Exit(EXIT_ERROR) from None
