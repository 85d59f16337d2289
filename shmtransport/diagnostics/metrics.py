"""Exports statistics to Prometheus; needs ``pip install 'shmtransport[metrics]'``.

No other module of the package imports this one. A ``StatisticsCollector`` reads its clients and servers when it is
scraped, and costs them nothing otherwise.

Rules that it keeps: every field of ``Statistics`` is exported under its own name, except ``latency_histogram``, which
becomes ``call_duration_seconds``; its buckets have the same bounds in every scrape, so that rates over them are right;
registering a client or server does not keep it alive.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Protocol

try:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "prometheus_client":
        raise
    raise ModuleNotFoundError(
        "shmtransport.diagnostics.metrics needs prometheus_client: pip install 'shmtransport[metrics]'", name=error.name
    ) from None

from ..endpoints.server_base import ServerBase
from ..statistics import Statistics

_PREFIX = "shmtransport"
_LABELS = ("name", "role")
_DURATION_BOUNDS_S = tuple(1e-6 * 2**octave for octave in range(1, 28))  # 2 µs to 134 s: bounds of Statistics' ranges
_NO_COUNTERS = ("in_flight_peak", "latency_histogram")
_HELP = {
    "calls": "Calls that have ended, including failed ones.",
    "failures": "Calls that failed.",
    "call_seconds": "Time of calls: on a client from submission to reply, on a server in handlers.",
    "serialize_seconds": "Time to make control messages, including the copies into the arena that they needed.",
    "deserialize_seconds": "Time to read control messages.",
    "tensor_bytes_sent": "Bytes of tensors sent, copied or not.",
    "tensor_bytes_received": "Bytes of tensors received.",
    "control_bytes_sent": "Bytes of control messages sent.",
    "control_bytes_received": "Bytes of control messages received.",
    "bytes_copied": "Bytes of tensors copied into an arena.",
    "tensors_copied": "Tensors copied into an arena.",
    "tensors_sent": "Tensors sent, copied or not.",
    "waits": "How often this side blocked in the kernel for a message.",
    "pinned_copies": "Copies between arenas and the server's GPU, straight from or to the arena.",
    "bounced_copies": "Copies between arenas and the server's GPU through a buffer.",
    "stalls": "How often a claim or a message had to wait for room.",
    "stall_seconds": "Time spent waiting for room.",
}


class HasStatistics(Protocol):
    """A client or server, blocking or asyncio."""

    def statistics(self) -> Statistics: ...


class StatisticsCollector(Collector):
    """Exports clients and servers, each labelled with its name and role ("client" or "server").

    Register it by ``prometheus_client.REGISTRY.register(collector)``. Several threads may use it at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[str, weakref.ref[HasStatistics]] = {}

    def register(self, client_or_server: HasStatistics, name: str) -> None:
        """Export a client or server under ``name``, for as long as it lives.

        Raises:
            ValueError: another client or server that still lives has this name.
        """
        with self._lock:
            taken = self._sources.get(name)
            if taken is not None and taken() not in (None, client_or_server):
                raise ValueError(f"another client or server is exported as {name!r}: choose another name for this one")
            self._sources[name] = weakref.ref(client_or_server)

    def unregister(self, name: str) -> None:
        """Stop exporting the client or server of this name; an unknown name is no error."""
        with self._lock:
            self._sources.pop(name, None)

    def collect(self) -> Iterable[Metric]:
        """Return all metrics; empty without a source, so that a registry learns their names."""
        sources = list(self._living())
        for field in fields(Statistics):
            if field.name not in _NO_COUNTERS:
                counter = CounterMetricFamily(f"{_PREFIX}_{field.name}", _HELP.get(field.name, ""), labels=_LABELS)
                for labels, found in sources:
                    counter.add_metric(labels, getattr(found, field.name))
                yield counter
        peak = GaugeMetricFamily(f"{_PREFIX}_in_flight_peak", "The most calls in flight at once.", labels=_LABELS)
        durations = HistogramMetricFamily(f"{_PREFIX}_call_duration_seconds", "Times of calls.", labels=_LABELS)
        for labels, found in sources:
            peak.add_metric(labels, found.in_flight_peak)
            durations.add_metric(labels, _buckets(found), found.call_seconds)
        yield peak
        yield durations

    def _living(self) -> Iterator[tuple[tuple[str, str], Statistics]]:
        """Yield labels and statistics of each source that still lives, and forget the others."""
        with self._lock:
            living = {name: source for name, reference in self._sources.items() if (source := reference()) is not None}
            self._sources = {name: self._sources[name] for name in living}
        for name, source in living.items():
            role = "server" if isinstance(source, ServerBase) else "client"
            yield (name, role), source.statistics()


def _buckets(found: Statistics) -> list[tuple[str, float]]:
    """Return a histogram in Prometheus' form: for each bound, how many calls took no longer.

    Each range of ``Statistics`` ends at one of these bounds or between two, so none is split.
    """
    buckets = [
        (repr(bound), float(sum(count for upper, count in found.latency_histogram if upper <= bound * (1 + 1e-9))))
        for bound in _DURATION_BOUNDS_S
    ]
    return [*buckets, ("+Inf", float(sum(count for _, count in found.latency_histogram)))]
