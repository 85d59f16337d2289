"""This project's transport, over ZeroMQ."""

from __future__ import annotations

import torch

from shmtransport import Client, Server

from .base import Contender

_ROOM = 4  # tensors that fit each arena


def _arena_bytes(nbytes: int) -> int:
    return max(_ROOM * nbytes, 1 << 20)


class InPlace(Contender):
    """Argument and result are made in the arenas."""

    name = "shmtransport in place"
    copies = "0"

    @classmethod
    def serve(cls, address: str, nbytes: int) -> None:
        server = Server(address)
        server.register("increment", lambda x: cls.increment(server, x))
        with server:
            print("ready", flush=True)
            server.serve()

    @staticmethod
    def increment(server: Server, x: torch.Tensor) -> torch.Tensor:
        """The handler."""
        return torch.add(x, 1, out=server.empty(x.shape, x.dtype))

    def connect(self, address: str, nbytes: int) -> None:
        self._client = Client(address, arena_bytes=_arena_bytes(nbytes))
        self._tensor = self._client.empty((nbytes,), torch.uint8)

    def call(self, value: int) -> torch.Tensor:
        result: torch.Tensor = self._client.call("increment", self._tensor.fill_(value))
        return result

    def close(self) -> None:
        self._client.close()


class CopyIn(InPlace):
    """Argument and result are made elsewhere and copied in."""

    name = "shmtransport copy in"
    copies = "2"

    @staticmethod
    def increment(server: Server, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def connect(self, address: str, nbytes: int) -> None:
        super().connect(address, nbytes)
        self._tensor = torch.empty((nbytes,), dtype=torch.uint8)
