"""What one client or server has done: counters while it runs, a frozen ``Statistics`` to look at."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .units import KIB, MIB

_SHORTEST_S = 1e-6
_RANGES_PER_OCTAVE = 8
_LATENCY_OCTAVES = 32  # 1 µs to more than an hour
_UNSORTED_LIMIT = 4096


@dataclass(frozen=True)
class Statistics:
    """Totals since the client or server was made; seconds are of the wall clock.

    On a client ``call_seconds`` runs from submitting a call to having its reply; on a server it is the time in
    handlers. ``serialize_seconds`` and ``deserialize_seconds`` cover making and reading control messages, with the
    copies into the arena that they needed. ``bytes_copied`` counts tensor bytes copied into an arena; tensors that
    already lay in it add nothing, nor does a message that was refused, since it is too large say. ``waits`` is how
    often this side blocked in the kernel for a message, ``stalls`` how often a claim or a message had to wait for room,
    ``stall_seconds`` for how long, ``in_flight_peak`` the most calls that were under way at once.
    ``latency_histogram`` has, for each range of call times that occurred, its upper bound in seconds and how many
    calls fell into it; a range is 9 % wide.
    """

    calls: int = 0
    failures: int = 0
    call_seconds: float = 0.0
    serialize_seconds: float = 0.0
    deserialize_seconds: float = 0.0
    tensor_bytes_sent: int = 0
    tensor_bytes_received: int = 0
    control_bytes_sent: int = 0
    control_bytes_received: int = 0
    bytes_copied: int = 0
    tensors_copied: int = 0
    tensors_sent: int = 0
    waits: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    in_flight_peak: int = 0
    latency_histogram: tuple[tuple[float, int], ...] = ()

    @property
    def copies_avoided(self) -> int:
        """How many tensors were sent from where they lay."""
        return self.tensors_sent - self.tensors_copied

    def latency_seconds(self, quantile: float) -> float:
        """The time within which this part (0 to 1) of all calls was done, to within 9 %; 0 if there were none.

        Raises:
            ValueError: the quantile is not between 0 and 1.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"a quantile lies between 0 and 1, not at {quantile}")
        wanted = quantile * sum(count for _, count in self.latency_histogram)
        seen = 0
        for bound, count in self.latency_histogram:
            seen += count
            if seen >= wanted:
                return bound
        return 0.0

    def rows(self) -> list[tuple[str, str]]:
        """Titles and values of the printed table, in order."""
        calls = max(self.calls, 1)

        def each(seconds: float) -> str:
            return f"{seconds / calls * 1e3:.3f} ms/call"

        return [
            ("calls", f"{self.calls}"),
            ("time", each(self.call_seconds)),
            ("time, p50", f"{self.latency_seconds(0.5) * 1e3:.3f} ms"),
            ("time, p99", f"{self.latency_seconds(0.99) * 1e3:.3f} ms"),
            ("serialise", each(self.serialize_seconds)),
            ("deserialise", each(self.deserialize_seconds)),
            ("tensors sent", f"{self.tensor_bytes_sent / MIB:.1f} MiB"),
            ("tensors received", f"{self.tensor_bytes_received / MIB:.1f} MiB"),
            ("copied in", f"{self.bytes_copied / MIB:.1f} MiB"),
            ("copies avoided", f"{self.copies_avoided}"),
            ("in flight, most", f"{self.in_flight_peak}"),
            ("waits", f"{self.waits}"),
            ("stalls for room", f"{self.stalls} ({self.stall_seconds:.3f} s)"),
            ("control sent", f"{self.control_bytes_sent / KIB:.1f} KiB"),
            ("control received", f"{self.control_bytes_received / KIB:.1f} KiB"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        left = max(len(title) for title, _ in rows)
        right = max(len(value) for _, value in rows)
        return "\n".join(f"{title.ljust(left)}  {value.rjust(right)}" for title, value in rows)


class Counters:
    """The mutable totals behind a ``Statistics``."""

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
        self._latencies = np.zeros(_LATENCY_OCTAVES * _RANGES_PER_OCTAVE, int)
        self._unsorted: list[float] = []

    def count_call(self, seconds: float) -> None:
        """One call is done."""
        self.calls += 1
        self.call_seconds += seconds
        self._unsorted.append(seconds)  # sorting each at once would cost every call
        if len(self._unsorted) >= _UNSORTED_LIMIT:
            self._sort()

    def _sort(self) -> None:
        unsorted, self._unsorted = self._unsorted, []
        octaves = np.log2(np.maximum(unsorted, _SHORTEST_S) / _SHORTEST_S)
        index = np.minimum((octaves * _RANGES_PER_OCTAVE).astype(int), len(self._latencies) - 1)
        self._latencies += np.bincount(index, minlength=len(self._latencies))

    @property
    def latency_histogram(self) -> tuple[tuple[float, int], ...]:
        """Upper bounds in seconds and counts of the ranges that are not empty."""
        self._sort()
        return tuple(
            (_SHORTEST_S * 2 ** ((index + 1) / _RANGES_PER_OCTAVE), count)
            for index, count in enumerate(self._latencies.tolist())
            if count
        )

    def snapshot(self) -> Statistics:
        return Statistics(**{field.name: getattr(self, field.name) for field in fields(Statistics)})
