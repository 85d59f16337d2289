"""The tables of the command line. Imported where there is one to print: rich takes longer to import than `ls` may."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..memory import leftovers
from ..text import printable
from ..units import size_text, time_text
from .connections import NO_CONNECTION

if TYPE_CHECKING:
    from ..memory.leftovers import SharedObject
    from .connections import Connections
    from .doctor import Verdict
    from .facts import ConnectedSegments, Limit, MachineFacts
    from .gpus import GpuFacts
    from .measure import ServerFacts

console = Console(highlight=False, soft_wrap=True)


def print_connections(connected: list[Connections]) -> None:
    """Print the connections of this user's processes."""
    console.print(_connections_table(connected))


def print_objects(found: list[SharedObject]) -> None:
    """Print the named objects of this user."""
    console.print(_objects_table(found))


def measuring() -> AbstractContextManager[object]:
    """Show on standard error that something is being measured."""
    return Console(stderr=True).status("measuring")


def print_verdicts(found: list[Verdict]) -> None:
    """Print what is to be fixed."""
    if all(verdict.level != "problem" for verdict in found):
        console.print("all is well", style="green")
    for verdict in found:
        console.print(
            printable(f"{verdict.level}: {verdict}"),
            style="red" if verdict.level == "problem" else "yellow",
            markup=False,
        )


def print_machine(machine: MachineFacts) -> None:
    """Print the facts about this machine."""
    variables = "\n".join(f"{name}={value}" for name, value in machine.environment.items())
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "kernel": f"{machine.kernel}, {machine.cores} cores",
        "/dev/shm": f"{size_text(machine.shm_free_bytes)} free of {size_text(machine.shm_bytes)}",
        "huge pages": machine.huge_pages,
        "core": machine.core,
        "segment guards": "on" if machine.guarded else "off",
        "GPUs": "\n".join(map(_gpu_text, machine.gpus)) or machine.no_gpu,
        "in use": _connected_text(machine.connected),
        "by name": _named_text(machine.named),
        "open files": _limit_text(machine.open_files),
        "locked memory": _limit_text(machine.locked_memory_bytes, in_bytes=True),
        "environment": variables or "no relevant variable is set",
    }
    console.print(_facts_table("machine", rows))


def print_server(server: ServerFacts) -> None:
    """Print the facts about a server, and how fast it is."""
    rows = {"address": f"{server.address} ({server.scheme})"}
    if server.socket is not None:
        rows["socket"] = f"mode {server.socket.mode:04o}, in a directory of {server.socket.directory_mode:04o}"
        rows["listening"] = f"process {server.socket.listener_pid}: {server.socket.listener_command}"
    rows["answering"] = f"process {server.server_pid}: {server.server_command}"
    rows["GPU"] = f"{server.gpu} {server.device}".strip()
    rows["arenas granted"] = f"{size_text(server.arena_bytes)} each way"
    first, second = server.first_touch_s_per_mib, server.second_touch_s_per_mib
    rows["filling an arena"] = f"{time_text(first)} per MiB the first time, {time_text(second)} the second"
    console.print(_facts_table("server", rows))
    console.print(_times_table(server))


def _gpu_text(gpu: GpuFacts) -> str:
    pinned, shared = gpu.not_pinned or "arenas can be pinned", gpu.not_shared or "arenas can be shared"
    return f"cuda:{gpu.ordinal} {gpu.name}, {gpu.uuid}: {pinned}; {shared}"


def _times_table(server: ServerFacts) -> Table:
    """Build the table of median times by size and channel, with the bandwidth of the copies."""
    usable = [channel for channel in server.channels if not channel.error]
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title="median times", title_justify="left")
    table.add_column("tensor\neach way", no_wrap=True)
    for channel in usable:
        for title in ("copied", "in place"):
            spin = f"spin {channel.spin_us:g}" if channel.spin_us else ""
            table.add_column(f"{channel.channel}\n{spin}\n{title}", justify="right", no_wrap=True)
    first = usable[0].channel if usable else "no channel"
    table.add_column(f"{first}\ncopied\nGB/s", justify="right", no_wrap=True)
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
        table.add_row(size_text(one.nbytes), f"{one.age_s:.0f} s", owner, Text(one.name))
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
        return NO_CONNECTION
    processes = ", ".join(map(str, connected.processes))
    return f"connections: {connected.count} segments without a name ({size_text(connected.nbytes)}), in {processes}"


def _limit_text(limit: Limit, *, in_bytes: bool = False) -> str:
    def text(value: int | None) -> str:
        if value is None:
            return "unlimited"
        return size_text(value) if in_bytes else str(value)

    return f"{text(limit.soft)} (hard: {text(limit.hard)})"
