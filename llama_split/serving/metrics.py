"""What the server counts, for Prometheus: requests, tokens and their times, and the transport's own totals."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shmtransport.diagnostics.metrics import StatisticsCollector

from .service import Service

_FIRST_TOKEN_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The totals of one server."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "llama_split_requests", "Requests by path and HTTP status.", ("path", "status"), registry=self._registry
        )
        self.prompt_tokens = Counter("llama_split_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.answer_tokens = Counter("llama_split_answer_tokens", "Tokens of answers.", registry=self._registry)
        self.first_token = Histogram(
            "llama_split_first_token_seconds",
            "Time from a request to the first part of its answer.",
            buckets=_FIRST_TOKEN_BOUNDS_S,
            registry=self._registry,
        )
        waiting = Gauge("llama_split_requests_waiting", "Requests that wait for a token.", registry=self._registry)
        waiting.set_function(lambda: service.engine.waiting)
        running = Gauge("llama_split_requests_running", "Requests that get tokens.", registry=self._registry)
        running.set_function(lambda: service.engine.running)
        transport = StatisticsCollector()
        for number, worker in enumerate(service.model.workers, start=1):
            transport.register(worker.client, f"worker {number}" if len(service.model.workers) > 1 else "worker")
        self._registry.register(transport)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
