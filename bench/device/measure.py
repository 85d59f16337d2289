"""Copies between arenas and a GPU beside torch's, and calls with tensors that stay on the GPU."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from shmtransport import Client

from ..harness.processes import scratch

MIB = 1 << 20
COPY_BYTES = 128 * MIB
SIZES = (64, 64 << 10, MIB, 16 * MIB, 128 * MIB)
_ARENA_BYTES = 512 * MIB
_WARM_UP = 5


class Unavailable(Exception):
    """There is no GPU to measure, in words."""


@dataclass(frozen=True)
class Copied:
    """One direction: microseconds for 128 MiB through the arena, and by torch from or to its own pinned memory."""

    direction: str
    ours_us: float
    torch_us: float

    @property
    def ratio(self) -> float:
        """Our bandwidth as a part of torch's."""
        return self.torch_us / self.ours_us


@dataclass(frozen=True)
class Called:
    """A call with a tensor of this size each way, on the GPU: microseconds, the median and the 99th of a hundred."""

    nbytes: int
    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class GpuRun:
    """All that was measured, and how tensors crossed."""

    gpu: str
    server_path: str
    client_path: str
    copied: list[Copied]
    called: list[Called]


def measure_gpu(device: str, calls: int, copies: int) -> GpuRun:
    """Measure a server in a process of its own.

    Raises:
        Unavailable: torch sees no GPU here.
    """
    if not torch.cuda.is_available():
        raise Unavailable("torch sees no GPU here (torch.cuda.is_available() is False)")
    with _server(device) as address:
        options = {"channel": "doorbell", "spin_us": 100.0, "arena_bytes": _ARENA_BYTES}
        with Client(address, **options) as client:  # type: ignore[arg-type]
            _until_pinned(client)
            copied = [_to_device(client, device, copies), _to_host(client, device, copies)]
            server_path = client.health()["device"]
        with Client(address, device=device, **options) as client:  # type: ignore[arg-type]
            called = [_call(client, device, nbytes, calls) for nbytes in SIZES]
            client_path = client.device_path
    return GpuRun(torch.cuda.get_device_name(device), server_path, client_path, copied, called)


@contextmanager
def _server(device: str) -> Iterator[str]:
    with scratch() as directory:
        address = f"ipc://{directory}/gpu.ipc"
        command = [sys.executable, "-m", "bench.device.server", address, device]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                if server.stdout is None or server.stdout.readline() != "ready\n":
                    raise Unavailable("the server did not start")
                yield address
            finally:
                server.terminate()


def _until_pinned(client: Client) -> None:
    deadline = time.monotonic() + 30
    while "being pinned" in client.health()["device"] and time.monotonic() < deadline:
        time.sleep(0.01)


def _to_device(client: Client, device: str, copies: int) -> Copied:
    x = client.empty((COPY_BYTES,), torch.uint8).fill_(1)
    small = client.empty((1,), torch.uint8)
    whole = _median(lambda: client.call("take", x), copies)
    call = _median(lambda: client.call("take", small), copies)
    host, there = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory(), torch.empty_like(x, device=device)
    return Copied("host to device", whole - call, _median(_synchronised(lambda: there.copy_(host, True)), copies))


def _to_host(client: Client, device: str, copies: int) -> Copied:
    whole = _median(lambda: client.call("give", COPY_BYTES), copies)
    call = _median(lambda: client.call("give", 1), copies)
    host, there = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory(), torch.ones(COPY_BYTES, device=device).byte()
    return Copied("device to host", whole - call, _median(_synchronised(lambda: host.copy_(there, True)), copies))


def _call(client: Client, device: str, nbytes: int, calls: int) -> Called:
    x = client.empty((nbytes,), torch.uint8, device=device).fill_(1)
    times = sorted(_times(lambda: client.call("lend", x, nbytes), calls))
    return Called(nbytes, statistics.median(times), times[min(len(times) * 99 // 100, len(times) - 1)])


def _synchronised(copy: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        copy()
        torch.cuda.synchronize()

    return run


def _median(call: Callable[[], object], count: int) -> float:
    return statistics.median(_times(call, count))


def _times(call: Callable[[], object], count: int) -> list[float]:
    """Microseconds of each call, after a few that are not counted."""
    times = []
    for _ in range(_WARM_UP + count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    return times[_WARM_UP:]
