"""The server's process of a pair: how it is started and ended, and how the client reads its CPU time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch

from llama_split.placement.local import temporary_directory

START_METHOD = "spawn"  # a fresh interpreter, as a user's server is
_NAMES_BYTES = 64  # for the directory's name and that of a socket that a library puts into it
_START_S = 60.0
_END_S = 2.0
_END_SLICE_S = 0.2
_CPU_CLOCK_OF_PROCESS = 2  # the low bits of a process's clock id; the rest is the complement of its pid


class Servable(Protocol):
    """What both processes of a pair make an object of: the client's makes the endpoint, the server's serves it."""

    directory: str

    def make_endpoint(self) -> Any:
        """Make what the server needs to be reached."""

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        """Answer until ``SystemExit``."""


def settle() -> None:
    """Prepare a process, client or server: one computing thread, and no warnings about views that can't be written."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A directory with a short path, removed afterwards; what can't lie in a directory is named after it."""
    parent = temporary_directory(_NAMES_BYTES)
    with tempfile.TemporaryDirectory(prefix="shmtb-", dir=parent, ignore_cleanup_errors=True) as directory:
        yield directory


@contextlib.contextmanager
def served(
    make: Callable[..., Servable], arguments: tuple[Any, ...], client: Servable, pin: bool = False
) -> Iterator[int]:
    """Run ``make(*arguments).serve`` in a fresh process while the block runs; yields its process id.

    Args:
        make: Makes the server's object, in its process.
        arguments: What ``make`` is called with.
        client: The client's object, which makes the endpoint.
        pin: Give the server the last core that this process may use, and this process the first from then on.

    Raises:
        RuntimeError: The server did not become ready.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(make, arguments, client.make_endpoint(), there), daemon=True)
    cores = sorted(os.sched_getaffinity(0))
    if pin:
        os.sched_setaffinity(0, cores[-1:])  # the new process inherits it
    process.start()
    if pin:
        os.sched_setaffinity(0, cores[:1])
    there.close()
    try:
        if not here.poll(_START_S):
            raise RuntimeError(f"the server was not ready within {_START_S:g} s")
        try:
            here.recv()
        except EOFError:
            raise RuntimeError("the server ended before it was ready; its own error is printed above") from None
        yield process.pid or 0
    finally:
        here.close()
        deadline = time.monotonic() + _END_S
        while process.is_alive() and time.monotonic() < deadline:
            process.terminate()  # again and again: a signal that comes just before a wait begins doesn't end the wait
            process.join(_END_SLICE_S)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _serve(make: Callable[..., Servable], arguments: tuple[Any, ...], endpoint: Any, ready: Any) -> None:
    def leave(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    settle()
    make(*arguments).serve(endpoint, lambda: ready.send(None))


def cpu_seconds(pids: Iterable[int]) -> float:
    """The CPU time of these processes so far; processes that have ended don't count."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | _CPU_CLOCK_OF_PROCESS)
    return total


class CpuMeter:
    """CPU seconds of this process and of the server's processes since ``start``."""

    def __init__(self, server_pids: Iterable[int]) -> None:
        self._server_pids = tuple(server_pids)
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._wall = time.perf_counter()
        self._client = cpu_seconds((os.getpid(),))
        self._server = cpu_seconds(self._server_pids)

    def read(self) -> tuple[float, float, float]:
        """Seconds of the client's CPU time, of the server's, and of wall time."""
        client = cpu_seconds((os.getpid(),)) - self._client
        return client, cpu_seconds(self._server_pids) - self._server, time.perf_counter() - self._wall
