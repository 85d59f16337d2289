"""Ray: calls to an actor, and the same actor in a compiled graph."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..harness.contender import Contender, PrivateTensors
from ..harness.content import respond, words

_STORE_TENSORS = 8
_SMALLEST_STORE_BYTES = 256 << 20
_SLACK_BYTES = 1 << 20


class RayActor(Contender):
    """``actor.answer.remote(array)`` with numpy arrays, which Ray copies into its store and then maps."""

    name = "Ray, actor call"
    how = "actor method with a numpy array, which Ray maps from its store (a torch tensor would be pickled)"
    copies = "2: into the store, each way (small ones inline)"
    reply = "read-only view of the store, valid while it is held"
    packages = (("ray", "ray"),)
    has_server = False
    in_flight = 2

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
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
        self._ray.get(self._actor.pid.remote())  # the actor runs
        self._pids = _descendants(os.getpid())
        self._tensors = PrivateTensors(1)
        self._pending: deque[Any] = deque()

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._tensors.next(nbytes)
        return self._request

    def send(self) -> None:
        self._pending.append(self._actor.answer.remote(self._request.numpy()))

    def receive(self) -> torch.Tensor:
        return torch.from_numpy(self._ray.get(self._pending.popleft()))

    def close(self) -> None:
        self._ray.shutdown()

    def server_pids(self) -> Sequence[int]:
        return self._pids


class RayGraph(RayActor):
    """The actor's method in a compiled graph, whose channels keep their shared memory."""

    name = "Ray, compiled graph"
    how = "the same method, experimental_compile with buffers of the largest size"
    copies = "2: into a channel, each way"
    reply = "read-only view of a channel, valid until it is freed"
    warm_up_calls = 20  # of the largest, the first dozen take 0.3 s each, later ones 0.02 s
    in_flight = 1  # a view of the last reply blocks the channel

    def connect(self) -> None:
        super().connect()
        from ray.dag import InputNode

        with InputNode() as request:
            node = self._actor.answer.bind(request)
        self._graph = node.experimental_compile(_buffer_size_bytes=self.max_nbytes + _SLACK_BYTES)

    def send(self) -> None:
        self._pending.append(self._graph.execute(self._request.numpy()))

    def close(self) -> None:
        self._graph.teardown()
        super().close()


class _Answerer:
    """The actor, which answers in a process of Ray's."""

    def __init__(self) -> None:
        self._tensors = PrivateTensors(1)

    def answer(self, request: Any) -> Any:
        reply = self._tensors.next(words(request.nbytes) * 8)
        respond(torch.from_numpy(request), reply)
        return reply.numpy()

    def pid(self) -> int:
        return os.getpid()


def _descendants(pid: int) -> list[int]:
    """All children of a process, their children, and so on."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            found += [int(child) for child in file.read().split()]
    return found + [below for child in found for below in _descendants(child)]
