"""This project's transport, over its channels."""

from __future__ import annotations

from typing import ClassVar

import torch

from shmtransport import ChannelKind, Client, Server

from .base import Contender

_ROOM = 4  # tensors that fit each arena


def _arena_bytes(nbytes: int) -> int:
    return max(_ROOM * nbytes, 1 << 20)


class InPlace(Contender):
    """Argument and result are made in the arenas."""

    name = "zmq, in place"
    copies = "0"
    channel: ClassVar[ChannelKind] = "zmq"
    spin_us: ClassVar[float] = 0.0

    @classmethod
    def serve(cls, address: str, nbytes: int) -> None:
        server = Server(address, spin_us=cls.spin_us)
        server.register("increment", lambda x: cls.increment(server, x))
        with server:
            print("ready", flush=True)
            server.serve()

    @staticmethod
    def increment(server: Server, x: torch.Tensor) -> torch.Tensor:
        """The handler."""
        return torch.add(x, 1, out=server.empty(x.shape, x.dtype))

    def connect(self, address: str, nbytes: int) -> None:
        self._client = Client(
            address, channel=self.channel, spin_us=self.spin_us, arena_bytes=_arena_bytes(nbytes), prefault=True
        )
        self._tensor = self._client.empty((nbytes,), torch.uint8)

    def call(self, value: int) -> torch.Tensor:
        result: torch.Tensor = self._client.call("increment", self._tensor.fill_(value))
        return result

    def close(self) -> None:
        self._client.close()


class CopyIn(InPlace):
    """Argument and result are made elsewhere and copied in."""

    name = "zmq, copy in"
    copies = "2"

    @staticmethod
    def increment(server: Server, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def connect(self, address: str, nbytes: int) -> None:
        super().connect(address, nbytes)
        self._tensor = torch.empty((nbytes,), dtype=torch.uint8)


class DoorbellInPlace(InPlace):
    """The same over the doorbell channel, blocking at once."""

    name = "doorbell, in place"
    channel = "doorbell"


class SpinningInPlace(DoorbellInPlace):
    """The same, looking for a while before it blocks."""

    name = "doorbell + spin, in place"
    spin_us = 2000.0
