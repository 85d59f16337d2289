"""One fresh pair of processes: ``python -m bench.pair CONTENDER MODE SIZES SECONDS`` prints a PairResult.

This process is the client and starts the server. MODE is "latency" or "throughput".
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from .contenders import CONTENDERS, Contender
from .content import check_full, check_stamp, fill, stamp
from .processes import CpuMeter, scratch, served, settle
from .results import PairResult, PairSize

_FULL_CALLS = 2
_WARM_UP_PATIENCE_S = 12.0  # then fewer will do
_WARM_UP_PART = 0.15  # of the seconds measured
_FEWEST_CALLS = 5
_PATIENCE_S = 2.0
_LEAST_CALLS = 2
_MOST_CALLS = 100_000


def measure(
    kind: type[Contender], mode: str, sizes: Sequence[int], seconds: float, idle_s: float = 0.0, pin: bool = False
) -> PairResult:
    """Measure a contender at some sizes, for ``seconds`` each, in this process and one that it starts.

    With ``idle_s`` look at both for so long while nobody calls; with ``pin`` give each side a core of its own.

    Raises:
        WrongAnswer: it does not deliver what was sent.
        RuntimeError: it does not work here.
    """
    settle()
    with scratch() as directory, contextlib.ExitStack() as stack:
        stack.callback(kind.clean, directory)
        contender = kind(directory, max(sizes))
        pids: list[int] = []
        if kind.has_server:
            pids.append(stack.enter_context(served(kind, (directory, max(sizes)), contender, pin)))
        try:
            contender.connect()
            meter = CpuMeter((*pids, *contender.server_pids()))
            one = _Throughput if mode == "throughput" else _Latency
            found = [_checked(one, contender, meter, nbytes, seconds) for nbytes in _sizes_of(kind, sizes)]
            client, server = _idle(meter, idle_s) if idle_s else (None, None)
        finally:
            contender.close()
    return PairResult(found, client, server)


def _sizes_of(kind: type[Contender], sizes: Sequence[int]) -> Sequence[int]:
    """A floor without a tensor has no size."""
    return sizes if kind.moves_tensors else [min(sizes)]


def _checked(
    one: type[_Latency | _Throughput], contender: Contender, meter: CpuMeter, nbytes: int, seconds: float
) -> PairSize:
    """Full calls, warm-up, the measured calls, and full calls once more."""
    _full(contender, nbytes, 0)
    loop = one(contender, nbytes)
    loop.run(seconds * _WARM_UP_PART, contender.warm_up_calls, _WARM_UP_PATIENCE_S)
    gc.collect()
    loop.forget()
    meter.start()
    loop.run(seconds, _FEWEST_CALLS, _PATIENCE_S)
    client, server, wall = meter.read()
    _full(contender, nbytes, _FULL_CALLS)
    return PairSize(nbytes, loop.samples_ns, client, server, wall, loop.calls)


def _full(contender: Contender, nbytes: int, seed: int) -> None:
    if contender.moves_tensors:
        for offset in range(_FULL_CALLS):
            fill(contender.prepare(nbytes), seed + offset)
            contender.send()
            check_full(contender.receive(), seed + offset, nbytes)


class _Latency:
    """Calls one after the other, each timed."""

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

    def run(self, seconds: float, fewest: int, patience_s: float) -> None:
        contender, nbytes, samples = self._contender, self._nbytes, self.samples_ns
        now = time.perf_counter_ns
        end = now() + int(seconds * 1e9)
        patience_end = now() + int(patience_s * 1e9)
        while (
            (now() < end and len(samples) < _MOST_CALLS)
            or (len(samples) < fewest and now() < patience_end)
            or len(samples) < _LEAST_CALLS
        ):
            self._value += 1
            if contender.moves_tensors:
                stamp(contender.prepare(nbytes), self._value)
            before = now()
            contender.send()
            reply = contender.receive()
            samples.append(now() - before)
            if contender.moves_tensors:
                check_stamp(reply, self._value, nbytes)
            del reply


class _Throughput:
    """As many calls under way as the contender can; all of the loop counts, with making and checking of tensors."""

    samples_ns: list[int] = []  # noqa: RUF012 - never written: there is no time of a single call

    def __init__(self, contender: Contender, nbytes: int) -> None:
        self._contender = contender
        self._nbytes = nbytes
        self._value = 0
        self.calls = 0

    def forget(self) -> None:
        self.calls = 0

    def run(self, seconds: float, fewest: int, patience_s: float) -> None:
        end = time.perf_counter() + seconds
        patience_end = time.perf_counter() + patience_s
        under_way: deque[int] = deque()
        while (self.calls < fewest and time.perf_counter() < patience_end) or time.perf_counter() < end:
            while len(under_way) < self._contender.in_flight:
                self._send(under_way)
            self._receive(under_way)
        while under_way:
            self._receive(under_way)

    def _send(self, under_way: deque[int]) -> None:
        self._value += 1
        stamp(self._contender.prepare(self._nbytes), self._value)
        self._contender.send()
        under_way.append(self._value)

    def _receive(self, under_way: deque[int]) -> None:
        check_stamp(self._contender.receive(), under_way.popleft(), self._nbytes)
        self.calls += 1


def _idle(meter: CpuMeter, seconds: float) -> tuple[float, float]:
    """Busy cores of both sides while nobody calls."""
    meter.start()
    time.sleep(seconds)
    client, server, wall = meter.read()
    return client / wall, server / wall


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("mode", choices=("latency", "throughput"))
    parser.add_argument("sizes")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--idle-s", type=float, default=0.0)
    parser.add_argument("--pin", action="store_true")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    kind = CONTENDERS[arguments.contender]
    result = measure(kind, arguments.mode, sizes, arguments.seconds, arguments.idle_s, arguments.pin)
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main()
