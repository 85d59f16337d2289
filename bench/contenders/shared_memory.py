"""What one writes by hand with the standard library: two blocks of shared memory, and a pipe to announce calls."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch

from ..harness.contender import Contender
from ..harness.content import respond, words


class SharedMemoryPipe(Contender):
    """``multiprocessing.shared_memory`` for the tensors, ``multiprocessing.Pipe`` for their sizes."""

    name = "shared_memory + Pipe"
    how = "one block each way, written in place and reused by every call; 8 bytes through a Pipe"
    copies = "0"
    reply = "overwritten by the next call"

    def make_endpoint(self) -> Any:
        self._end, other = multiprocessing.Pipe()
        self._blocks = [SharedMemory(create=True, size=self.max_nbytes) for _ in range(2)]
        return other, self._blocks

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        end, blocks = endpoint
        requests, replies = (torch.frombuffer(block.buf, dtype=torch.int64) for block in blocks)
        requests.numpy().max()  # maps every page
        replies.zero_()
        ready()
        while True:
            count = int.from_bytes(end.recv_bytes(), "little")
            respond(requests[:count], replies[:count])
            end.send_bytes(count.to_bytes(8, "little"))

    def connect(self) -> None:
        self._requests, self._replies = (torch.frombuffer(block.buf, dtype=torch.int64) for block in self._blocks)
        self._requests.zero_()
        self._replies.numpy().max()

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._requests[: words(nbytes)]
        return self._request

    def send(self) -> None:
        self._end.send_bytes(len(self._request).to_bytes(8, "little"))

    def receive(self) -> torch.Tensor:
        return self._replies[: int.from_bytes(self._end.recv_bytes(), "little")]

    def close(self) -> None:
        self._end.close()
        for block in self._blocks:
            block.unlink()
