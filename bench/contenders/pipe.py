"""The standard library's pipe between processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from ..harness.contender import Contender, PrivateTensors
from ..harness.content import respond


class Pipe(Contender):
    """``multiprocessing.Pipe``: sends from the tensor's memory and receives into memory that it keeps."""

    name = "multiprocessing.Pipe"
    how = "send_bytes of the tensor's memory, recv_bytes_into a tensor that it keeps"
    copies = "6: kernel in, kernel out and out of the reader's buffer, each way"
    reply = "overwritten by the next call"

    def make_endpoint(self) -> Any:
        self._end, other = multiprocessing.Pipe()
        return other

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        landing = torch.zeros(self.max_nbytes // 8, dtype=torch.int64)
        tensors = PrivateTensors(1)
        ready()
        while True:
            nbytes = endpoint.recv_bytes_into(landing.numpy())
            reply = tensors.next(nbytes)
            respond(landing[: nbytes // 8], reply)
            endpoint.send_bytes(reply.numpy().data)

    def connect(self) -> None:
        self._landing = torch.zeros(self.max_nbytes // 8, dtype=torch.int64)
        self._tensors = PrivateTensors(1)

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._tensors.next(nbytes)
        return self._request

    def send(self) -> None:
        self._end.send_bytes(self._request.numpy().data)

    def receive(self) -> torch.Tensor:
        nbytes = self._end.recv_bytes_into(self._landing.numpy())
        return self._landing[: nbytes // 8]

    def close(self) -> None:
        self._end.close()
