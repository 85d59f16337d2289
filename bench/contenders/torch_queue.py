"""PyTorch's own way: queues that pass tensors in shared memory as file descriptors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from ..harness.contender import Contender
from ..harness.content import respond, words


class TorchQueue(Contender):
    """``torch.multiprocessing.SimpleQueue`` each way; tensors are shared once and reused."""

    name = "torch.multiprocessing queues"
    how = "SimpleQueue each way; tensors shared once with share_memory_() and reused, as PyTorch advises"
    copies = "0"
    reply = "overwritten by the next call"

    def make_endpoint(self) -> Any:
        context = torch.multiprocessing.get_context("spawn")
        self._queues = context.SimpleQueue(), context.SimpleQueue()
        self._shared: dict[int, torch.Tensor] = {}
        return self._queues

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        requests, replies = endpoint
        self._shared = {}
        ready()
        while True:
            request = requests.get()  # holding the previous one until now keeps its mapping for the next
            reply = self._shared_tensor(request.nbytes)
            respond(request, reply)
            replies.put(reply)

    def connect(self) -> None:
        self._last: torch.Tensor | None = None

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._shared_tensor(nbytes)
        return self._request

    def send(self) -> None:
        self._queues[0].put(self._request)

    def receive(self) -> torch.Tensor:
        reply: torch.Tensor = self._queues[1].get()
        self._last = reply  # keeps the mapping, as in the server
        return reply

    def close(self) -> None:
        for queue in self._queues:
            queue.close()

    def _shared_tensor(self, nbytes: int) -> torch.Tensor:
        """The tensor of this size in shared memory."""
        found = self._shared.get(nbytes)
        if found is None:
            found = self._shared[nbytes] = torch.zeros(words(nbytes), dtype=torch.int64)
            found.share_memory_()  # type: ignore[no-untyped-call]
        return found
