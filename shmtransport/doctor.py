"""The diagnosis: facts of the machine and of a server, and what they mean, in words with a remedy.

``examine`` collects and measures; ``verdicts`` is a pure function of what was found. Printing is ``commands``' task.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .facts import MachineFacts, machine_facts
from .leftovers import in_words
from .measure import SIZES, ChannelTimes, ServerFacts, SocketFacts, measure
from .units import KIB, MIB, size_text

Level = Literal["problem", "advice"]

_SCARCE_SHM_BYTES = 256 * MIB  # two clients with arenas of the default size
_FILES_A_CLIENT = 6  # counted: two segments of two descriptors, a socket, a pidfd
_FILES_ELSE = 100
_DEFAULT_MAX_CLIENTS = 64
_COSTLY_TOUCH_S_PER_MIB = 30e-6  # about what copying a MiB takes
_SHORT_ROUND_TRIP_S = 40e-6  # nobody had to be woken
_LONG_ROUND_TRIP_S = 1e-3
_FASTER = 0.8  # less than this part of the time is worth a word
_SLOW_BYTES_PER_S = 1e9
_COPIED_BYTES = 256 * KIB  # from here on the copies take longer than the call


@dataclass(frozen=True)
class Facts:
    """All that was found; ``server`` is None where no address was asked about."""

    machine: MachineFacts
    server: ServerFacts | None = None


@dataclass(frozen=True)
class Verdict:
    """A finding and what to do about it. A problem is to be mended; advice makes what works faster or clearer."""

    level: Level
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.finding}: {self.remedy}"


def examine(address: str | None = None) -> Facts:
    """Look at this machine and, if an address is given, at the server there.

    Raises:
        TransportError: the server can't be measured; see ``measure.measure``.
    """
    machine = machine_facts()  # before the measurement takes its own share
    return Facts(machine, None if address is None else measure(address))


def verdicts(facts: Facts) -> list[Verdict]:
    """What is wrong or could be better, problems first; empty if all is well."""
    found = list(_of_machine(facts.machine))
    if facts.server is not None:
        found += _of_server(facts.server, facts.machine)
    return sorted(found, key=lambda verdict: verdict.level != "problem")


def report(facts: Facts) -> dict[str, Any]:
    """All as plain values for JSON; ``ok`` is whether no problem was found."""
    found = verdicts(facts)
    return {
        "ok": not has_problem(found),
        **asdict(facts),
        "verdicts": [asdict(verdict) for verdict in found],
    }


def has_problem(found: list[Verdict]) -> bool:
    """Whether anything is to be mended."""
    return any(verdict.level == "problem" for verdict in found)


def time_text(seconds: float) -> str:
    """A time in µs, ms or s, with three digits."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _of_machine(machine: MachineFacts) -> Iterator[Verdict]:
    if machine.shm_bytes == 0:
        yield Verdict("problem", "there is no /dev/shm", "mount a tmpfs there")
    elif machine.shm_free_bytes < _SCARCE_SHM_BYTES:
        yield Verdict(
            "problem",
            f"/dev/shm has only {size_text(machine.shm_free_bytes)} free of {size_text(machine.shm_bytes)}",
            "enlarge it (mount -o remount,size=… /dev/shm; docker run --shm-size=…) or choose a smaller arena_bytes",
        )
    dead = [one for one in machine.named if one.dead]
    if dead:
        yield Verdict(
            "problem", f"/dev/shm holds {in_words(dead)}", "shmtransport clean; any server does it too when it starts"
        )
    needed = _FILES_ELSE + _FILES_A_CLIENT * _DEFAULT_MAX_CLIENTS
    soft = machine.open_files.soft
    if soft is not None and soft < needed:
        yield Verdict(
            "problem",
            f"the open-file limit of {soft} is low for {_DEFAULT_MAX_CLIENTS} clients of a server, which take "
            f"{_FILES_A_CLIENT} each",
            f"ulimit -n {needed} or more before it starts",
        )


def _of_server(server: ServerFacts, machine: MachineFacts) -> Iterator[Verdict]:
    if server.transport == "tcp":
        yield Verdict(
            "advice",
            "this is tcp: expect about twice the round trip of ipc",
            "use an ipc:// address on both sides",
        )
    if server.socket is not None:
        yield from _of_socket(server.socket, server)
    elsewhere = machine.environment.get("LLAMA_IPC_PATH")
    if elsewhere is not None and elsewhere != server.address:
        yield Verdict(
            "advice",
            f"LLAMA_IPC_PATH is {elsewhere}, not the address that was examined; llama-split takes it where it is "
            "given no other",
            "unset it, or examine that address too",
        )
    yield from _of_channels(server, machine)
    extra_s = server.first_touch_s_per_mib - server.second_touch_s_per_mib
    if extra_s > _COSTLY_TOUCH_S_PER_MIB:
        arena = size_text(server.arena_bytes)
        yield Verdict(
            "advice",
            f"arena pages are not faulted in before they are used: each MiB takes {time_text(extra_s)} longer the "
            f"first time, an arena of {arena} {time_text(extra_s * server.arena_bytes / MIB)}",
            "pass prefault=True to Client and Server if the first calls must be as fast as later ones",
        )
    if server.arena_bytes < max(SIZES):
        yield Verdict(
            "advice",
            f"arenas of no more than {size_text(server.arena_bytes)} were to be had, so larger tensors were not "
            "measured",
            "raise the server's max_arena_bytes or max_total_arena_bytes, or enlarge /dev/shm",
        )


def _of_socket(found: SocketFacts, server: ServerFacts) -> Iterator[Verdict]:
    directory = os.path.dirname(found.path)
    writable = stat.S_IWGRP | stat.S_IWOTH
    if found.directory_mode & writable and not found.directory_mode & stat.S_ISVTX:
        yield Verdict(
            "problem",
            f"the socket's directory {directory} is writable by others, who could put their own server there",
            f"chmod 700 {directory}, or use another",
        )
    if found.mode & writable:
        yield Verdict("problem", f"other users may connect to {found.path}", f"chmod 600 {found.path}")
    if found.listener_pid > 0 and found.listener_uid not in (os.geteuid(), 0):
        yield Verdict(
            "problem",
            f"process {found.listener_pid} of user {found.listener_uid} listens there, another user than you",
            "make sure that it is the server that you mean",
        )
    if found.listener_pid > 0 and 0 < server.server_pid != found.listener_pid:
        yield Verdict(
            "problem",
            f"process {found.listener_pid} listens, but process {server.server_pid} holds the reply arena",
            "look for something that forwards messages, and do without",
        )


def _of_channels(server: ServerFacts, machine: MachineFacts) -> Iterator[Verdict]:
    for one in server.channels:
        if one.error:
            yield Verdict("problem", f"the {one.name} can't be used", one.error)
    usable = [one for one in server.channels if not one.error]
    fastest = min(usable, key=lambda one: one.round_trip_s)
    if fastest.round_trip_s > _LONG_ROUND_TRIP_S:
        yield Verdict(
            "problem",
            f"even the fastest round trip took {time_text(fastest.round_trip_s)}",
            "the server or the machine is busy: look at its load, and ask again when it is idle",
        )
    plain = usable[0]
    if plain is not fastest and _is_worth_it(plain, fastest) and (machine.cores > 1 or not fastest.spin_us):
        yield Verdict("advice", _compared(plain, fastest), _how_to_use(fastest))
    copies = [size for one in usable for size in one.sizes if size.nbytes >= _COPIED_BYTES]
    slowest = min(copies, key=lambda size: size.copied_bytes_per_s, default=None)
    if slowest is not None and slowest.copied_bytes_per_s < _SLOW_BYTES_PER_S:
        yield Verdict(
            "problem",
            f"copying {size_text(slowest.nbytes)} in and out took {time_text(slowest.copied_s)}, "
            f"{slowest.copied_bytes_per_s / 1e9:.2f} GB/s",
            _how_to_copy(machine),
        )


def _how_to_copy(machine: MachineFacts) -> str:
    """Why copies may be slow. By default OpenMP's threads spin while they wait, on cores that others may need."""
    variables = machine.environment
    if variables.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" or variables.get("OMP_NUM_THREADS") == "1":
        return "look at the machine's load; tensors made by client.empty() and server.empty() need no copy"
    return (
        f"threads of both sides may be spinning on the same {machine.cores} cores: set OMP_WAIT_POLICY=PASSIVE or "
        "OMP_NUM_THREADS=1 for both; tensors made by client.empty() and server.empty() need no copy"
    )


def _is_worth_it(plain: ChannelTimes, other: ChannelTimes) -> bool:
    return plain.round_trip_s > _SHORT_ROUND_TRIP_S and other.round_trip_s < _FASTER * plain.round_trip_s


def _compared(plain: ChannelTimes, other: ChannelTimes) -> str:
    """Both round trips; why the first takes longer."""
    why = ", since the idle side must be woken each time" if other.spin_us else ""
    return (
        f"a round trip takes {time_text(plain.round_trip_s)} on the {plain.name}{why}; "
        f"the {other.name} took {time_text(other.round_trip_s)}"
    )


def _how_to_use(channel: ChannelTimes) -> str:
    if not channel.spin_us:
        return f'Client(…, channel="{channel.channel}")'
    return (
        f'Client(…, channel="{channel.channel}", spin_us={channel.spin_us:g}), and spin_us for the Server too, '
        "where a core may be kept busy"
    )
