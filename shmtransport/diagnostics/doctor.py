"""Diagnoses a machine and a server: what the facts mean, in words, with a remedy.

``examine`` collects and measures; ``verdicts`` is a pure function of what it found. ``cli`` prints both.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..channels.address import IPC
from ..memory.leftovers import in_words
from ..units import KIB, MIB, size_text, time_text
from .facts import MachineFacts, machine_facts
from .measure import SIZES, ChannelTimes, ServerFacts, SocketFacts, measure

Level = Literal["problem", "advice"]

_SCARCE_SHM_BYTES = 256 * MIB  # two clients with arenas of the default size
_FILES_A_CLIENT = 6  # counted: two segments with two descriptors each, a socket, a pidfd
_FILES_ELSE = 100
_DEFAULT_MAX_CLIENTS = 64
_COSTLY_TOUCH_S_PER_MIB = 30e-6  # about as long as copying a MiB
_SHORT_ROUND_TRIP_S = 40e-6  # no side had to be woken
_LONG_ROUND_TRIP_S = 1e-3
_FASTER = 0.8  # below this share of the time, a channel is worth mentioning
_SLOW_BYTES_PER_S = 1e9
_COPIED_BYTES = 256 * KIB  # from this size on, the copies take longer than the call


@dataclass(frozen=True)
class Facts:
    """All that was found; ``server`` is None if no address was given."""

    machine: MachineFacts
    server: ServerFacts | None = None


@dataclass(frozen=True)
class Verdict:
    """A finding and its remedy. Problems need fixing; advice is optional."""

    level: Level
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.finding}: {self.remedy}"


def examine(address: str | None = None) -> Facts:
    """Examine this machine and, if an address is given, measure the server there.

    Raises:
        TransportError: the server can't be measured; see ``measure.measure``.
    """
    machine = machine_facts()  # first, since measuring takes its own share
    return Facts(machine, None if address is None else measure(address))


def verdicts(facts: Facts) -> list[Verdict]:
    """Return what is wrong or could be better, problems first; empty if all is well."""
    found = list(_of_machine(facts.machine))
    if facts.server is not None:
        found += _of_server(facts.server, facts.machine)
    return sorted(found, key=lambda verdict: verdict.level != "problem")


def report(facts: Facts) -> dict[str, Any]:
    """Return facts and verdicts as plain values for JSON; ``ok`` means that there is no problem."""
    found = verdicts(facts)
    return {
        "ok": not has_problem(found),
        **asdict(facts),
        "verdicts": [asdict(verdict) for verdict in found],
    }


def has_problem(found: list[Verdict]) -> bool:
    """Return whether any verdict is a problem."""
    return any(verdict.level == "problem" for verdict in found)


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
            "problem",
            f"/dev/shm holds {in_words(dead)}",
            "run shmtransport clean; every server does it too when it starts",
        )
    needed = _FILES_ELSE + _FILES_A_CLIENT * _DEFAULT_MAX_CLIENTS
    soft = machine.open_files.soft
    if soft is not None and soft < needed:
        yield Verdict(
            "problem",
            f"the open-file limit of {soft} is low for {_DEFAULT_MAX_CLIENTS} clients of a server, which take "
            f"{_FILES_A_CLIENT} each",
            f"run ulimit -n {needed} or more before the server starts",
        )
    if not machine.guarded:
        yield Verdict(
            "advice",
            "a peer that cuts a segment short ends this process with SIGBUS: there is no compiled core, or "
            "SHMTRANSPORT_SIGBUS is off",
            "install shmtransport where there is a C compiler, and unset SHMTRANSPORT_SIGBUS",
        )
    yield from _of_gpus(machine)


def _of_gpus(machine: MachineFacts) -> Iterator[Verdict]:
    for gpu in machine.gpus:
        if gpu.not_pinned:
            yield Verdict(
                "advice",
                f"arenas can't be pinned for cuda:{gpu.ordinal}, so tensors are copied once more on their way there: "
                f"{gpu.not_pinned}",
                "none where confidential computing forbids it; otherwise raise the limit on locked memory (ulimit -l)",
            )
        if gpu.not_shared:
            yield Verdict(
                "advice",
                f"arenas on cuda:{gpu.ordinal} can't be shared between processes: {gpu.not_shared}",
                "pinned arenas are used in their place",
            )
    if machine.gpus and "expandable_segments:True" in machine.environment.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        yield Verdict(
            "advice",
            "torch allocates in expandable segments, whose tensors are copied by the GPU before they are sent",
            'send tensors made by empty(…, device="cuda"), which are not copied',
        )


def _of_servers_gpu(server: ServerFacts, machine: MachineFacts) -> Iterator[Verdict]:
    if server.device.startswith("not pinned"):
        yield Verdict(
            "advice",
            f"the server's tensors get to its GPU through a buffer: {server.device}",
            "none where confidential computing forbids it; otherwise raise its limit on locked memory (ulimit -l)",
        )
    if not (server.gpu and machine.gpus):
        return
    if server.gpu not in {gpu.uuid for gpu in machine.gpus}:
        yield Verdict(
            "advice",
            f"the server uses the GPU {server.gpu}, which this process does not see: tensors on a GPU can't be shared",
            "set CUDA_VISIBLE_DEVICES to the same GPU on both sides",
        )
    elif server.server_pid <= 0:
        yield Verdict(
            "advice",
            "the server runs in another PID namespace, where memory on a GPU can't be shared with it",
            "run both in one namespace (docker run --pid=container:…)",
        )


def _of_server(server: ServerFacts, machine: MachineFacts) -> Iterator[Verdict]:
    if server.scheme == "tcp":
        yield Verdict(
            "advice",
            "this is tcp: expect about twice the round trip of ipc",
            "use an ipc:// address on both sides",
        )
    if server.socket is not None:
        yield from _of_socket(server.socket, server)
    for name, value in machine.environment.items():
        if value.startswith(IPC) and value != server.address:
            yield Verdict(
                "advice",
                f"{name} is {value}, not the address that was examined",
                "if a program takes its address from there, unset it, or examine that address too",
            )
    yield from _of_channels(server, machine)
    yield from _of_servers_gpu(server, machine)
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
            f"arenas of no more than {size_text(server.arena_bytes)} could be obtained, so larger tensors were not "
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
            f"process {found.listener_pid} of user {found.listener_uid} listens there, not one of yours",
            "make sure that it is the server you mean",
        )
    if found.listener_pid > 0 and 0 < server.server_pid != found.listener_pid:
        yield Verdict(
            "problem",
            f"process {found.listener_pid} listens, but process {server.server_pid} holds the reply arena",
            "find and remove what forwards the messages",
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
            "the server or the machine is busy: look at its load, and measure again when it is idle",
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
    """Say why copies may be slow. OpenMP's idle threads spin by default, on cores that others need."""
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
    """Compare two round trips, and say why the first takes longer."""
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
