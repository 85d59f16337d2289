"""Totals of what one client or server does, and a histogram of its calls' times.

Any thread may call any method, and so may a signal handler or a finalizer in the middle of one, without a lock: a total
is read and written without calling anything in between, and CPython switches threads and runs handlers and finalizers
only at calls and loops. The attributes are for reading.
"""

from __future__ import annotations

import math
import operator

from ..statistics import LATENCY_RANGES, RANGES_PER_OCTAVE, SHORTEST_S

_UNSORTED_LIMIT = 4096


class Counters:
    """The totals; each method says what has happened. ``statistics`` describes them."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures = 0
        self.call_seconds = 0.0
        self.serialize_seconds = 0.0
        self.deserialize_seconds = 0.0
        self.tensor_bytes_sent = 0
        self.tensor_bytes_received = 0
        self.control_bytes_sent = 0
        self.control_bytes_received = 0
        self.bytes_copied = 0
        self.tensors_copied = 0
        self.tensors_sent = 0
        self.waits = 0
        self.stalls = 0
        self.stall_seconds = 0.0
        self.in_flight_peak = 0
        self._latencies = [0] * LATENCY_RANGES
        self._unsorted: list[float] = []

    def count_sent(
        self,
        control_bytes: int,
        seconds: float = 0.0,
        tensors: int = 0,
        tensor_bytes: int = 0,
        copied: int = 0,
        copied_bytes: int = 0,
    ) -> None:
        """A message was made.

        Args:
            control_bytes: its size.
            seconds: how long making it took, with the copies into the arena.
            tensors: how many tensors it carries.
            tensor_bytes: the size of all of them.
            copied: how many of them were copied into the arena.
            copied_bytes: the size of those.
        """
        self.control_bytes_sent += control_bytes
        self.serialize_seconds += seconds
        if tensors:
            self.tensors_sent += tensors
            self.tensor_bytes_sent += tensor_bytes
            self.tensors_copied += copied
            self.bytes_copied += copied_bytes

    def count_received(self, control_bytes: int, tensor_bytes: int, seconds: float) -> None:
        """A message was read.

        Args:
            control_bytes: its size.
            tensor_bytes: the size of its tensors.
            seconds: how long reading it took, with the copies for a snapshot.
        """
        self.control_bytes_received += control_bytes
        self.tensor_bytes_received += tensor_bytes
        self.deserialize_seconds += seconds

    def count_call(self, seconds: float, failed: bool = False) -> None:
        """A call is done."""
        self.calls += 1
        self.failures += failed
        self.call_seconds += seconds
        self._unsorted.append(seconds)  # sorting each at once would cost every call
        if len(self._unsorted) >= _UNSORTED_LIMIT:
            self._sort()

    def count_failure(self) -> None:
        """A call that is counted elsewhere has failed."""
        self.failures += 1

    def count_in_flight(self, calls: int) -> None:
        """This many calls are in flight at once."""
        if calls > self.in_flight_peak:
            self.in_flight_peak = calls

    def count_wait(self) -> None:
        """This side blocked in the kernel for a message."""
        self.waits += 1

    def count_stall(self) -> None:
        """A claim or a message has begun to wait for room."""
        self.stalls += 1

    def count_stalled(self, seconds: float) -> None:
        """A claim or a message has waited this long for room."""
        self.stall_seconds += seconds

    def latencies(self) -> list[int]:
        """How many calls fell into each of ``LATENCY_RANGES`` ranges of time: see ``range_of``."""
        self._sort()
        return list(self._latencies)

    def _sort(self) -> None:
        fresh: list[float] = []
        unsorted = self._unsorted
        self._unsorted = fresh
        counts = [0] * LATENCY_RANGES
        for index in map(range_of, unsorted):
            counts[index] += 1
        while True:
            before = self._latencies
            after = list(map(operator.add, before, counts))
            if self._latencies is before:  # else an inner call has added its own
                self._latencies = after
                break


def range_of(seconds: float) -> int:
    """The range of a call's time: the first up to ``SHORTEST_S``, and from there ``RANGES_PER_OCTAVE`` an octave."""
    if not seconds > SHORTEST_S:
        return 0
    return int(min(math.log2(seconds / SHORTEST_S) * RANGES_PER_OCTAVE, LATENCY_RANGES - 1))
