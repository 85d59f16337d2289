"""PyTorch's own way: queues that pass tensors in shared memory, by file descriptor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from ..content import respond, words
from .base import Contender


class TorchQueue(Contender):
    """``torch.multiprocessing.SimpleQueue`` each way; tensors that were shared once are sent again and again."""

    name = "torch.multiprocessing queues"
    how = "SimpleQueue each way; tensors shared once with share_memory_() and used again, as PyTorch advises"
    copies = "0"
    reply = "overwritten by the next call"

    def link(self) -> Any:
        context = torch.multiprocessing.get_context("spawn")
        self._queues = context.SimpleQueue(), context.SimpleQueue()
        self._shared: dict[int, torch.Tensor] = {}
        return self._queues

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        requests, replies = link
        self._shared = {}
        ready()
        while True:
            request = requests.get()  # the name keeps the mapping until the next is there, which may then share it
            reply = self._place(request.nbytes)
            respond(request, reply)
            replies.put(reply)

    def connect(self) -> None:
        self._last: torch.Tensor | None = None

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._place(nbytes)
        return self._request

    def send(self) -> None:
        self._queues[0].put(self._request)

    def receive(self) -> torch.Tensor:
        reply: torch.Tensor = self._queues[1].get()
        self._last = reply  # as in the server
        return reply

    def close(self) -> None:
        for queue in self._queues:
            queue.close()

    def _place(self, nbytes: int) -> torch.Tensor:
        """A tensor in shared memory, one of each size."""
        found = self._shared.get(nbytes)
        if found is None:
            found = self._shared[nbytes] = torch.zeros(words(nbytes), dtype=torch.int64)
            found.share_memory_()  # type: ignore[no-untyped-call]
        return found
