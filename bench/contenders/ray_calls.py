"""Ray: calls of an actor, and the same actor in a compiled graph."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..content import respond, words
from .base import Contender, PrivateTensors

_STORE_TENSORS = 8
_SMALLEST_STORE_BYTES = 256 << 20
_SLACK_BYTES = 1 << 20


class RayActor(Contender):
    """``actor.answer.remote(array)``: numpy arrays, which Ray puts into its store and maps without a copy."""

    name = "Ray, actor call"
    how = "actor method with a numpy array, which Ray maps from its store (a torch tensor would be pickled)"
    copies = "2: into the store, each way (small ones inline)"
    reply = "read-only view of the store, valid for as long as it is held"
    packages = (("ray", "ray"),)
    has_server = False
    in_flight = 2

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        raise NotImplementedError("Ray starts its own processes")

    def connect(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        self._ray: Any = ray
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=max(_STORE_TENSORS * self.max_nbytes, _SMALLEST_STORE_BYTES),
            _temp_dir=self.directory,
        )
        self._actor = self._ray.remote(_Answerer).remote()
        self._ray.get(self._actor.pid.remote())  # it is there
        self._pids = _descendants(os.getpid())
        self._tensors = PrivateTensors(1)
        self._under_way: deque[Any] = deque()

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._tensors.next(nbytes)
        return self._request

    def send(self) -> None:
        self._under_way.append(self._actor.answer.remote(self._request.numpy()))

    def receive(self) -> torch.Tensor:
        return torch.from_numpy(self._ray.get(self._under_way.popleft()))

    def close(self) -> None:
        self._ray.shutdown()

    def server_pids(self) -> Sequence[int]:
        return self._pids


class RayGraph(RayActor):
    """The actor's method in a compiled graph, whose channels are shared memory that is kept."""

    name = "Ray, compiled graph"
    how = "the same method, experimental_compile with buffers of the largest size"
    copies = "2: into a channel, each way"
    reply = "read-only view of a channel, valid until it is given back"
    warm_up_calls = 20  # the first dozen of the largest take 0.3 s each, later ones 0.02 s
    in_flight = 1  # a view of the last reply keeps the channel from taking the next

    def connect(self) -> None:
        super().connect()
        from ray.dag import InputNode

        with InputNode() as request:
            node = self._actor.answer.bind(request)
        self._graph = node.experimental_compile(_buffer_size_bytes=self.max_nbytes + _SLACK_BYTES)

    def send(self) -> None:
        self._under_way.append(self._graph.execute(self._request.numpy()))

    def close(self) -> None:
        self._graph.teardown()
        super().close()


class _Answerer:
    """The actor."""

    def __init__(self) -> None:
        self._tensors = PrivateTensors(1)

    def answer(self, request: Any) -> Any:
        reply = self._tensors.next(words(request.nbytes) * 8)
        respond(torch.from_numpy(request), reply)
        return reply.numpy()

    def pid(self) -> int:
        return os.getpid()


def _descendants(pid: int) -> list[int]:
    """All processes that a process has started, and they."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            found += [int(child) for child in file.read().split()]
    return found + [below for child in found for below in _descendants(child)]
