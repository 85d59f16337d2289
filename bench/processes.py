"""The server's process of a pair: started fresh, told to end, and its CPU time read from here."""

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

from llama_split.launcher import temporary_directory

START_METHOD = "spawn"  # a fresh interpreter, as a user's server is
_NAMES_BYTES = 64  # of the directory, and of a socket that a peer puts into it
_START_S = 60.0
_END_S = 2.0
_END_SLICE_S = 0.2
_CPU_CLOCK_OF_PROCESS = 2  # the kernel's clock id of a process is its complement, shifted, with this below


class Serving(Protocol):
    """What can be served: one object here for the client, one in the server's process."""

    directory: str

    def link(self) -> Any:
        """What the server is given."""

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        """Answer until ``SystemExit``."""


def settle() -> None:
    """The same for both processes: one thread computes, and a view that can't be written is no mistake here."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A directory with a short path, removed afterwards; its name is used for what can't lie in a directory."""
    parent = temporary_directory(_NAMES_BYTES)
    with tempfile.TemporaryDirectory(prefix="shmtb-", dir=parent, ignore_cleanup_errors=True) as directory:
        yield directory


@contextlib.contextmanager
def served(
    make: Callable[..., Serving], arguments: tuple[Any, ...], local: Serving, pin: bool = False
) -> Iterator[int]:
    """Run ``make(*arguments).serve`` in a fresh process while the block runs; gives its process id.

    With ``pin`` it gets the last core of those that this process may use, and this process the first from then on.

    Raises:
        RuntimeError: it did not get ready.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(make, arguments, local.link(), there), daemon=True)
    cores = sorted(os.sched_getaffinity(0))
    if pin:
        os.sched_setaffinity(0, cores[-1:])  # which the new process inherits
    process.start()
    if pin:
        os.sched_setaffinity(0, cores[:1])
    there.close()
    try:
        if not here.poll(_START_S):
            raise RuntimeError("the server did not get ready in time")
        try:
            here.recv()
        except EOFError:
            raise RuntimeError("the server ended before it was ready; its error stands above") from None
        yield process.pid or 0
    finally:
        here.close()
        deadline = time.monotonic() + _END_S
        while process.is_alive() and time.monotonic() < deadline:
            process.terminate()  # more than once: a signal just before a wait begins doesn't end that
            process.join(_END_SLICE_S)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _serve(make: Callable[..., Serving], arguments: tuple[Any, ...], link: Any, ready: Any) -> None:
    def leave(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    settle()
    make(*arguments).serve(link, lambda: ready.send(None))


def cpu_seconds(pids: Iterable[int]) -> float:
    """The CPU time of these processes so far; one that has ended counts nothing."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | _CPU_CLOCK_OF_PROCESS)
    return total


class CpuMeter:
    """CPU seconds of this process and of the server's processes, from ``start`` on."""

    def __init__(self, server_pids: Iterable[int]) -> None:
        self._server_pids = tuple(server_pids)
        self.start()

    def start(self) -> None:
        """From now on."""
        self._wall = time.perf_counter()
        self._client = cpu_seconds((os.getpid(),))
        self._server = cpu_seconds(self._server_pids)

    def read(self) -> tuple[float, float, float]:
        """Seconds: of the client's CPU, of the server's, of the wall clock."""
        client = cpu_seconds((os.getpid(),)) - self._client
        return client, cpu_seconds(self._server_pids) - self._server, time.perf_counter() - self._wall
