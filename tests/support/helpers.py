"""What several of these files need: types, handlers, processes, threads, and waiting for a condition."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from shmtransport import Client, ConnectRefused, Server
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import KIB, MIB
from tests.support.process import ROOT, Process

SERVER = ROOT / "tests/support/processes/server.py"
CLIENT = ROOT / "tests/support/processes/client.py"
Serve = Callable[..., Server]
Spawn = Callable[..., Process]


class DeliberateError(Exception):
    """Raised by a handler on purpose."""


def echo(value: Any = None) -> Any:
    return value


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether something that another thread or process does comes true in time; waits for it."""
    deadline = time.monotonic() + within_s
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return true


def start_server(spawn: Spawn, address: str, **options: Any) -> Process:
    """Start ``processes/server.py`` with options of Server, or ``tells=True`` to hear who has left."""
    return spawn(SERVER, address, json.dumps(options))


def start_client(spawn: Spawn, address: str, channel: ChannelKind, what: str, arena_bytes: int = MIB) -> Process:
    """Start ``processes/client.py``, which does ``what``."""
    return spawn(CLIENT, address, channel, what, str(arena_bytes))


def in_thread(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Future[Any]:
    """Run a function in a thread of its own, which doesn't keep this process from ending."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments, **keywords))
        except BaseException as error:  # noqa: BLE001 - it is raised again by the future
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def connect_within(address: str, channel: ChannelKind, arena_bytes: int, within_s: float = 5.0) -> Client:
    """A client with both arenas of this size, as soon as the server grants them."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return Client(address, channel=channel, arena_bytes=arena_bytes)
        except ConnectRefused:  # noqa: PERF203
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def mapped_segments(pid: int) -> set[str]:
    """The paths of the segments that a process has mapped; those without a name end in " (deleted)"."""
    with open(f"/proc/{pid}/maps") as maps:
        return {line[line.index("/dev/shm/") :].rstrip("\n") for line in maps if "/dev/shm/shmtransport-" in line}


@contextlib.contextmanager
def undisturbed(address: str, channel: ChannelKind) -> Iterator[None]:
    """Another client calls all the while with contents checked; some of its calls come after the block's end."""
    stop = threading.Event()
    checked = 0

    def work() -> None:
        nonlocal checked
        with Client(address, channel=channel, arena_bytes=64 * KIB) as client:
            while not stop.is_set():
                x = torch.full((1000,), float(checked))
                assert torch.equal(client.call("double", x), x * 2)
                checked += 1

    working = in_thread(work)
    try:
        assert eventually(lambda: checked > 0 or working.done())
        yield
        before = checked
        assert eventually(lambda: checked > before + 20 or working.done())
    finally:
        stop.set()
        working.result(10.0)
