"""Prometheus: every total under its own name, a proper histogram, and nothing unless asked for."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shmtransport import AsyncClient, Client, Server, Statistics
from shmtransport.core import Counters
from shmtransport.diagnostics.metrics import StatisticsCollector
from tests.support.process import ROOT

Labels = tuple[str, str]


class Source:
    """Something with statistics."""

    def __init__(self, statistics: Statistics | None = None) -> None:
        self.counters = Counters()
        self._fixed = statistics

    def statistics(self) -> Statistics:
        return self._fixed or Statistics.of(self.counters)


class Scraped:
    """What a scrape of a collector gives, by sample name and labels."""

    def __init__(self, collector: StatisticsCollector) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.types: dict[str, str] = {}
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            self.types[family.name] = family.type
            for sample in family.samples:
                self.samples[sample.name, frozenset(sample.labels.items())] = sample.value

    def value(self, sample: str, **labels: str) -> float:
        return self.samples["shmtransport_" + sample, frozenset(labels.items())]


@pytest.fixture
def collector() -> StatisticsCollector:
    return StatisticsCollector()


def test_every_field_is_exported_under_its_own_name(collector: StatisticsCollector) -> None:
    """All numbers of Statistics, each with a value of its own; a new field can't be forgotten."""
    totals = {field.name: index + 1 for index, field in enumerate(fields(Statistics))}
    source = Source(Statistics(**{**totals, "latency_histogram": ()}))  # type: ignore[arg-type]
    collector.register(source, "one")
    scraped = Scraped(collector)
    labels = {"name": "one", "role": "client"}
    for name, value in totals.items():
        if name == "latency_histogram":
            continue
        if name == "in_flight_peak":
            assert scraped.types[f"shmtransport_{name}"] == "gauge"
            assert scraped.value(name, **labels) == value
        else:
            assert scraped.types[f"shmtransport_{name}"] == "counter"
            assert scraped.value(f"{name}_total", **labels) == value


def test_the_histogram_counts_each_call_once(collector: StatisticsCollector) -> None:
    """Cumulative, every call at or above its time, the last bucket is the count, the sum is the time in calls."""
    source = Source()
    times = [0.5e-6, 3e-6, 3.9e-6, 100e-6, 100e-6, 0.9, 5000.0]
    for seconds in times:
        source.counters.count_call(seconds)
    collector.register(source, "one")
    scraped = Scraped(collector)
    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in scraped.samples.items()
        if name == "shmtransport_call_duration_seconds_bucket"
    }
    assert len(buckets) == 28
    for bound, value in buckets.items():
        assert value == sum(seconds <= bound for seconds in times), bound
    labels = {"name": "one", "role": "client"}
    assert buckets[float("inf")] == scraped.value("call_duration_seconds_count", **labels) == len(times)
    assert scraped.value("call_duration_seconds_sum", **labels) == pytest.approx(sum(times))
    assert scraped.types["shmtransport_call_duration_seconds"] == "histogram"


def test_bounds_are_the_same_whatever_was_counted(collector: StatisticsCollector) -> None:
    """Rates over buckets that come and go would be wrong."""

    def bounds() -> set[str]:
        return {dict(labels)["le"] for name, labels in Scraped(collector).samples if name.endswith("_bucket")}

    source = Source()
    collector.register(source, "one")
    before = bounds()
    for exponent in range(-6, 5):
        source.counters.count_call(10.0**exponent)
    assert bounds() == before
    assert len(before) == 28


def test_several_sources_differ_by_their_labels(collector: StatisticsCollector) -> None:
    """Each has its own numbers; one that is unregistered is gone, and unregistering it again does nothing."""
    first, second = Source(Statistics(calls=1)), Source(Statistics(calls=2))
    collector.register(first, "first")
    collector.register(second, "second")
    scraped = Scraped(collector)
    assert scraped.value("calls_total", name="first", role="client") == 1
    assert scraped.value("calls_total", name="second", role="client") == 2
    collector.unregister("first")
    collector.unregister("first")
    assert {dict(labels)["name"] for _, labels in Scraped(collector).samples} == {"second"}


def test_a_name_is_taken_for_as_long_as_its_owner_lives(collector: StatisticsCollector) -> None:
    """Two of one name would be one series; registering the same one again is no mistake."""
    first, second = Source(), Source(Statistics(calls=7))
    collector.register(first, "one")
    collector.register(first, "one")
    with pytest.raises(ValueError, match="another client or server is exported as 'one'"):
        collector.register(second, "one")
    del first
    gc.collect()
    collector.register(second, "one")
    assert Scraped(collector).value("calls_total", name="one", role="client") == 7


def test_registering_keeps_nobody_alive(collector: StatisticsCollector) -> None:
    """A source that was dropped is no longer exported; without any source all names are still known."""
    source = Source()
    collector.register(source, "one")
    del source
    gc.collect()
    scraped = Scraped(collector)
    assert scraped.samples == {}
    assert scraped.types["shmtransport_calls"] == "counter"
    assert scraped.types["shmtransport_call_duration_seconds"] == "histogram"


def test_a_real_client_and_server(collector: StatisticsCollector, serve: Callable[..., Server], address: str) -> None:
    """Their roles are known, asyncio's included, and calls are counted on both sides."""
    server = serve(echo=lambda x: x)
    with Client(address) as client:
        collector.register(client, "trusted")
        collector.register(server, "worker")
        asynchronous = AsyncClient(address)
        collector.register(asynchronous, "loop")
        for _ in range(3):
            client.call("echo", torch.ones(10))
        scraped = Scraped(collector)
        assert scraped.value("calls_total", name="trusted", role="client") == 3
        assert scraped.value("tensor_bytes_sent_total", name="worker", role="server") == 120
        assert scraped.value("calls_total", name="loop", role="client") == 0
        assert scraped.value("call_duration_seconds_count", name="trusted", role="client") == 3
    collector.unregister("worker")


def test_it_is_off_by_default() -> None:
    """Importing the package imports neither this module nor prometheus_client."""
    names = "'prometheus_client', 'shmtransport.diagnostics.metrics'"
    code = f"import sys, shmtransport; print(*(name in sys.modules for name in ({names})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install."""
    monkeypatch.delitem(sys.modules, "shmtransport.diagnostics.metrics")
    for name in [name for name in sys.modules if name.split(".")[0] == "prometheus_client"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ModuleNotFoundError, match=r"^[^\n]*pip install 'shmtransport\[metrics\]'$"):
        importlib.import_module("shmtransport.diagnostics.metrics")
