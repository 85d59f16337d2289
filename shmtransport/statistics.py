"""The totals of what one client or server does, frozen; ``core/counters`` counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .units import KIB, MIB

SHORTEST_S = 1e-6
RANGES_PER_OCTAVE = 8
_HISTOGRAM = "latency_histogram"
_OF_DEVICE = ("pinned_copies", "bounced_copies")
LATENCY_RANGES = 32 * RANGES_PER_OCTAVE  # octaves: 1 µs to more than an hour


@dataclass(frozen=True)
class Statistics:
    """Totals since the client or server was made. Seconds are of the wall clock.

    * ``calls``, ``failures``: those that are done, and how many of them raised.
    * ``call_seconds``: on a client, from submitting a call until its reply is there; on a server, the time in handlers.
    * ``serialize_seconds``, ``deserialize_seconds``: making and reading messages, with the copies that they needed.
    * ``tensors_sent``, ``tensor_bytes_sent``, ``tensor_bytes_received``: tensors, however they got into the arena.
    * ``tensors_copied``, ``bytes_copied``: those of them that had to be copied into the arena first.
    * ``control_bytes_sent``, ``control_bytes_received``: the messages themselves. One that is refused, for example
      since it is too large, counts nothing, and neither do its tensors.
    * ``waits``: how often this side blocked in the kernel for a message.
    * ``stalls``, ``stall_seconds``: how often a claim or a message had to wait for room, and for how long.
    * ``pinned_copies``, ``bounced_copies``: copies between arenas and a server's GPU: direct ones, and
      those through a buffer.
    * ``in_flight_peak``: the most calls that were in flight at once.
    * ``latency_histogram``: for each range of call times that occurred, its upper bound in seconds and how many calls
      fell into it; a range is 9 % wide.
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
    pinned_copies: int = 0
    bounced_copies: int = 0
    in_flight_peak: int = 0
    latency_histogram: tuple[tuple[float, int], ...] = ()

    @classmethod
    def of(cls, counters: Any) -> Statistics:
        """All totals of a ``core.Counters`` as they are now."""
        names = [field.name for field in fields(cls) if field.name not in (_HISTOGRAM, *_OF_DEVICE)]
        totals = {name: getattr(counters, name) for name in names}
        ranges = tuple(
            (SHORTEST_S * 2 ** ((index + 1) / RANGES_PER_OCTAVE), count)
            for index, count in enumerate(counters.latencies())
            if count
        )
        return cls(**totals, latency_histogram=ranges)

    @classmethod
    def total(cls, several: Sequence[Statistics]) -> Statistics:
        """The totals of several clients or servers together; the peak is the highest of theirs."""
        added = {
            field.name: sum(getattr(one, field.name) for one in several)
            for field in fields(cls)
            if field.name not in (_HISTOGRAM, "in_flight_peak")
        }
        counts: Counter[float] = Counter()
        for one in several:
            counts.update(dict(one.latency_histogram))
        peak = max((one.in_flight_peak for one in several), default=0)
        return cls(**added, in_flight_peak=peak, latency_histogram=tuple(sorted(counts.items())))

    @property
    def copies_avoided(self) -> int:
        """How many tensors were sent without a copy."""
        return self.tensors_sent - self.tensors_copied

    def latency_seconds(self, quantile: float) -> float:
        """The time within which this fraction (0 to 1) of all calls was done, to within 9 %; 0 if there were none.

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
