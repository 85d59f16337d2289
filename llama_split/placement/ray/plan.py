"""What an application on Ray serves, and where its processes stand."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from ...boundary.choices import KEY_VARIABLE, LEAST_KV_TOKENS, check_dtype, parse_channel, parse_mode
from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.demo import demo_model
from ...checkpoint.shares import Share, shares_of
from ...checkpoint.synthetic import RandomCheckpoint
from ...errors import LlamaSplitError


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One application; the same on all of its processes.

    Attributes:
        model: directory, GGUF file or hub id, the same on all nodes; with ``random_weights`` a shape. None: the demo's.
        random_weights: weights are random, by ``seed``.
        seed: of random weights.
        mode: the split.
        dtype: of weights and arithmetic.
        wire_dtype: of activations that cross. None: as ``dtype``.
        channel: "zmq" or "doorbell".
        device: where workers compute.
        workers: how many share the layers beside each trusted process.
        elsewhere: how many more share them, each on another node.
        replicas: trusted processes, each with its own workers.
        max_replicas: the most that Serve may start as requests grow. None: as many as ``replicas``.
        requests_per_replica: how many requests each one is meant to have under way, for autoscaling.
        cpus: CPUs that Ray reserves for each trusted process and each worker, and threads that it computes with.
        gpus: GPUs that Ray reserves for each worker.
        served_name: what clients call the model. None: its file's name.
        api_key: what clients must send. None: nothing.
        max_waiting: requests that may wait for their first token, for each replica.
        max_kv_tokens: tokens that each replica's KV cache has room for. None: as in ``llama-split serve``.
        drain_s: seconds that running requests have to finish when a replica is stopped.
        recovery_s: seconds without its worker after which a replica is replaced.
    """

    model: str | None = None
    random_weights: bool = False
    seed: int = 0
    mode: str = "fused"
    dtype: str = "float32"
    wire_dtype: str | None = None
    channel: str = "doorbell"
    device: str = "cpu"
    workers: int = 1
    elsewhere: int = 0
    replicas: int = 1
    max_replicas: int | None = None
    requests_per_replica: float = 8.0
    cpus: float = 1.0
    gpus: float = 0.0
    served_name: str | None = None
    api_key: str | None = None
    max_waiting: int = 128
    max_kv_tokens: int | None = None
    drain_s: float = 30.0
    recovery_s: float = 60.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({msgspec.to_builtins(self.without_key())})"

    def without_key(self) -> Plan:
        """The same without what only the trusted processes need."""
        return msgspec.structs.replace(self, api_key=None)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Plan:
        """A plan from options, whose values may be text as on a command line.

        Raises:
            LlamaSplitError: an option is unknown, or a value can't be used.
        """
        given = {**options, "api_key": options.get("api_key") or os.environ.get(KEY_VARIABLE) or None}
        try:
            plan = msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise LlamaSplitError(f"the application can't be built: {error}; its options are {known}") from None
        plan.check()
        return plan

    def check(self) -> None:
        """Refuse what could only fail on the cluster.

        Raises:
            LlamaSplitError: a value can't be used.
        """
        parse_mode(self.mode)
        for dtype in (self.dtype, self.wire_dtype or self.dtype):
            check_dtype(dtype)
        parse_channel(self.channel)
        least: dict[str, tuple[float, float]] = {
            "workers": (self.workers, 1),
            "elsewhere": (self.elsewhere, 0),
            "replicas": (self.replicas, 1),
            "max_replicas": (self.most_replicas, self.replicas),
            "max_waiting": (self.max_waiting, 1),
            "max_kv_tokens": (LEAST_KV_TOKENS if self.max_kv_tokens is None else self.max_kv_tokens, LEAST_KV_TOKENS),
            "gpus": (self.gpus, 0),
            "drain_s": (self.drain_s, 0),
            "recovery_s": (self.recovery_s, 0),
        }
        for name, (value, limit) in least.items():
            if not value >= limit:
                raise LlamaSplitError(f"{name} is {value:g}; it must be {limit:g} or more")
        for name, above in {"cpus": self.cpus, "requests_per_replica": self.requests_per_replica}.items():
            if not above > 0:
                raise LlamaSplitError(f"{name} is {above:g}; it must be more than 0")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise LlamaSplitError(f"gpus is {self.gpus:g}; above 1 it must be a whole number")

    @property
    def most_replicas(self) -> int:
        """The most replicas that there may be."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def threads(self) -> int:
        """Threads that each process computes with."""
        return max(int(self.cpus), 1)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The resources of one replica's placement group: of what stands beside the trusted process, then elsewhere."""
        trusted = {"CPU": self.cpus}
        worker = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        if not self.elsewhere:
            return [trusted, *([worker] * self.workers)]
        together = {name: trusted.get(name, 0.0) + self.workers * value for name, value in worker.items()}
        return [together, *([worker] * self.elsewhere)]

    @property
    def strategy(self) -> str:
        """How Ray places the bundles: all on one node, or each on another."""
        return "STRICT_SPREAD" if self.elsewhere else "STRICT_PACK"

    def bundle_of(self, worker: int) -> int:
        """The bundle that a worker stands in, by its place among the workers."""
        if not self.elsewhere:
            return worker + 1
        return max(worker - self.workers + 1, 0)

    def is_elsewhere(self, worker: int) -> bool:
        """Whether a worker stands on another node than the trusted process."""
        return worker >= self.workers

    def open_checkpoint(self) -> Checkpoint:
        """The model's files.

        Raises:
            CheckpointError: there is no such model, or none that can be split.
        """
        name = str(demo_model()) if self.model is None else self.model
        return RandomCheckpoint(name, self.seed) if self.random_weights else open_checkpoint(name)

    def shares(self, checkpoint: Checkpoint) -> list[Share]:
        """What each worker holds.

        Raises:
            LlamaSplitError: there are fewer layers than workers.
        """
        limits = [None] * (self.workers + self.elsewhere)
        return shares_of(checkpoint.outline, parse_mode(self.mode), check_dtype(self.dtype), limits)
