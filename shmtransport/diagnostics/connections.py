"""Finds the connections on this machine: which processes share segments, how large these are, and at which address.

The sources are the kernel's tables: which process has mapped which segment (``/proc/PID/maps``), which sockets it has
open (``/proc/PID/fd``), and where these listen (``/proc/PID/net``). They cover the processes that this user may
inspect.

A server listens for as long as it lives, so of two processes the one that does not listen is the client. If both
listen, the tables don't tell which is the server, and neither does this module.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .facts import SegmentId, processes_with_segments

NO_CONNECTION = "no connection of this user is in use"

_ACCEPTS = 0x10000  # __SO_ACCEPTCON among a unix socket's flags
_TCP_LISTEN = "0A"


@dataclass(frozen=True)
class Connections:
    """All connections between the same two processes.

    Attributes:
        processes: those of the two that can be seen, once each; also children that were forked from one of them.
        client_pid: the client's process; None: unknown.
        server_pid: the server's process; None: unknown.
        count: how many connections there are.
        nbytes: the size of all their segments.
        addresses: where the server's process listens; with several, any of them may be this server's.
    """

    processes: tuple[int, ...]
    client_pid: int | None
    server_pid: int | None
    count: int
    nbytes: int
    addresses: tuple[str, ...]


def connections() -> list[Connections]:
    """Find the connections of this user's processes, by process id."""
    sizes: dict[SegmentId, int] = {}
    mapped: defaultdict[SegmentId, dict[int, int]] = defaultdict(dict)  # how often, by process
    for process, segments in processes_with_segments():
        for segment, (nbytes, times) in segments.items():
            sizes[segment] = max(sizes.get(segment, 0), nbytes // times)
            mapped[segment][process] = times
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for segment, times_by_process in mapped.items():
        both_in_one = len(times_by_process) == 1 and max(times_by_process.values()) > 1
        groups[tuple(sorted(times_by_process)) * (2 if both_in_one else 1)].append(sizes[segment])
    return [_between(processes, nbytes) for processes, nbytes in sorted(groups.items())]


def _between(processes: tuple[int, ...], sizes: list[int]) -> Connections:
    addresses = {process: listening_addresses(process) for process in processes}
    listening = [process for process in processes if addresses[process]]
    others = [process for process in processes if not addresses[process]]
    client = server = None
    if len(processes) == 2 and processes[0] == processes[1]:
        client = server = processes[0]
    elif len(processes) == 2 and len(listening) == 1:
        (client,), (server,) = others, listening
    elif len(processes) == 1 and others:  # the server is another user's, or in another container
        (client,) = others
    return Connections(
        processes=tuple(sorted(set(processes))),
        client_pid=client,
        server_pid=server,
        count=-(-len(sizes) // 2),  # one in each direction
        nbytes=sum(sizes),
        addresses=() if server is None else addresses[server],
    )


def listening_addresses(process: int) -> tuple[str, ...]:
    """Return the addresses at which a process listens, sorted; none if it can't be inspected."""
    opened = set()
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for number in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(FileNotFoundError):  # just closed
                opened.add(os.readlink(f"/proc/{process}/fd/{number}"))
    places = {**dict(_unix_sockets(process)), **dict(_tcp_sockets(process))}
    return tuple(sorted({address for inode, address in places.items() if f"socket:[{inode}]" in opened}))


def _table(process: int, name: str) -> Iterator[list[str]]:
    """Yield the fields of each row of a table of the process's network."""
    try:
        with open(f"/proc/{process}/net/{name}", encoding="utf-8", errors="surrogateescape") as rows:
            next(rows)
            yield from (row.rstrip("\n").split(maxsplit=11) for row in rows)
    except (OSError, StopIteration):
        return


def _unix_sockets(process: int) -> Iterator[tuple[str, str]]:
    """Yield inode and address of every listening socket that has a path."""
    for row in _table(process, "unix"):
        path = " ".join(row[7:])
        if int(row[3], 16) & _ACCEPTS and path.startswith("/"):
            yield row[6], f"ipc://{path}"


def _tcp_sockets(process: int) -> Iterator[tuple[str, str]]:
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for row in _table(process, name):
            host, _, port = row[1].partition(":")
            if row[3] == _TCP_LISTEN:
                words = [bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8)]
                text = socket.inet_ntop(family, b"".join(words))
                yield row[9], f"tcp://{f'[{text}]' if ':' in text else text}:{int(port, 16)}"
