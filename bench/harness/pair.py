"""Measures one contender in a fresh pair of processes: this one is the client and starts the server.

``python -m bench.harness.pair CONTENDER MEASUREMENT SIZES SECONDS`` prints a ``PairResult``; CONTENDER is an import
path such as ``bench.contenders.pipe:Pipe``, MEASUREMENT is "latency" or "throughput".
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from .contender import Contender, import_contender
from .content import check_full, check_stamp, fill, stamp
from .processes import CpuMeter, scratch, served, settle
from .results import PairResult, PairSize

_FULL_CALLS = 2
_WARM_UP_SHARE = 0.15  # of the seconds measured
_WARM_UP_PATIENCE_S = 12.0  # how long a slow contender may take for its warm-up calls
_ENOUGH_CALLS = 5  # a slow contender goes on until it has made this many,
_PATIENCE_S = 2.0  # or until this has passed,
_LEAST_CALLS = 2  # but never makes fewer than these
_MOST_CALLS = 100_000

Measurement = Literal["latency", "throughput"]


def measure(
    make: type[Contender],
    measurement: Measurement,
    sizes: Sequence[int],
    seconds: float,
    idle_s: float = 0.0,
    pin: bool = False,
) -> PairResult:
    """Measure a contender in this process and one that it starts.

    Args:
        make: The contender's class.
        measurement: What to measure.
        sizes: Bytes of the tensors.
        seconds: How long to measure each size.
        idle_s: How long to watch the CPU time of both sides afterwards, without calls; 0 to skip that.
        pin: Whether to give each side a core of its own.

    Raises:
        WrongAnswer: It does not deliver what was sent.
        RuntimeError: It does not work here.
    """
    settle()
    with scratch() as directory, contextlib.ExitStack() as stack:
        stack.callback(make.clean, directory)
        contender = make(directory, max(sizes))
        pids: list[int] = []
        if make.has_server:
            pids.append(stack.enter_context(served(make, (directory, max(sizes)), contender, pin)))
        try:
            contender.connect()
            meter = CpuMeter((*pids, *contender.server_pids()))
            loop = _ThroughputLoop if measurement == "throughput" else _LatencyLoop
            results = [_measure_size(loop, contender, meter, nbytes, seconds) for nbytes in _sizes_of(make, sizes)]
            client, server = _idle(meter, idle_s) if idle_s else (None, None)
        finally:
            contender.close()
    return PairResult(results, client, server)


def _sizes_of(contender: type[Contender], sizes: Sequence[int]) -> Sequence[int]:
    """The sizes to measure; a floor without a tensor has no size and is measured once."""
    return sizes if contender.moves_tensors else [min(sizes)]


def _measure_size(
    make: type[_LatencyLoop | _ThroughputLoop], contender: Contender, meter: CpuMeter, nbytes: int, seconds: float
) -> PairSize:
    """Full calls, warm-up, the measured calls, and full calls again."""
    _full_calls(contender, nbytes, 0)
    loop = make(contender, nbytes)
    loop.run(seconds * _WARM_UP_SHARE, contender.warm_up_calls, _WARM_UP_PATIENCE_S)
    gc.collect()
    loop.forget()
    meter.start()
    loop.run(seconds, _ENOUGH_CALLS, _PATIENCE_S)
    client, server, wall = meter.read()
    _full_calls(contender, nbytes, _FULL_CALLS)
    return PairSize(nbytes, loop.samples_ns, client, server, wall, loop.calls)


def _full_calls(contender: Contender, nbytes: int, seed: int) -> None:
    if contender.moves_tensors:
        for offset in range(_FULL_CALLS):
            fill(contender.prepare(nbytes), seed + offset)
            contender.send()
            check_full(contender.receive(), seed + offset, nbytes)


class _LatencyLoop:
    """Makes one call after another and times each."""

    def __init__(self, contender: Contender, nbytes: int) -> None:
        self._contender = contender
        self._nbytes = nbytes
        self._value = 0
        self.samples_ns: list[int] = []

    @property
    def calls(self) -> int:
        return len(self.samples_ns)

    def forget(self) -> None:
        self.samples_ns = []

    def run(self, seconds: float, enough: int, patience_s: float) -> None:
        contender, nbytes, samples = self._contender, self._nbytes, self.samples_ns
        now = time.perf_counter_ns
        end = now() + int(seconds * 1e9)
        patience_end = now() + int(patience_s * 1e9)
        while (
            (now() < end and len(samples) < _MOST_CALLS)
            or (len(samples) < enough and now() < patience_end)
            or len(samples) < _LEAST_CALLS
        ):
            self._value += 1
            if contender.moves_tensors:
                stamp(contender.prepare(nbytes), self._value)
            before = now()
            reply = contender.call()
            samples.append(now() - before)
            if contender.moves_tensors:
                check_stamp(reply, self._value, nbytes)
            del reply


class _ThroughputLoop:
    """Keeps as many calls in flight as the contender can; all of the loop counts, stamping and checking included."""

    samples_ns: list[int] = []  # noqa: RUF012 - never written: no call is timed by itself

    def __init__(self, contender: Contender, nbytes: int) -> None:
        self._contender = contender
        self._nbytes = nbytes
        self._value = 0
        self.calls = 0

    def forget(self) -> None:
        self.calls = 0

    def run(self, seconds: float, enough: int, patience_s: float) -> None:
        end = time.perf_counter() + seconds
        patience_end = time.perf_counter() + patience_s
        in_flight: deque[int] = deque()
        while (self.calls < enough and time.perf_counter() < patience_end) or time.perf_counter() < end:
            while len(in_flight) < self._contender.in_flight:
                self._send(in_flight)
            self._receive(in_flight)
        while in_flight:
            self._receive(in_flight)

    def _send(self, in_flight: deque[int]) -> None:
        self._value += 1
        stamp(self._contender.prepare(self._nbytes), self._value)
        self._contender.send()
        in_flight.append(self._value)

    def _receive(self, in_flight: deque[int]) -> None:
        check_stamp(self._contender.receive(), in_flight.popleft(), self._nbytes)
        self.calls += 1


def _idle(meter: CpuMeter, seconds: float) -> tuple[float, float]:
    """Busy cores of both sides without calls."""
    meter.start()
    time.sleep(seconds)
    client, server, wall = meter.read()
    return client / wall, server / wall


def main() -> None:
    """Measure as the command line asks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("measurement", choices=get_args(Measurement))
    parser.add_argument("sizes")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--idle-s", type=float, default=0.0)
    parser.add_argument("--pin", action="store_true")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    contender = import_contender(arguments.contender)
    result = measure(contender, arguments.measurement, sizes, arguments.seconds, arguments.idle_s, arguments.pin)
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main()
