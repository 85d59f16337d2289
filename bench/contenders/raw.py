"""The floor of every transport that signals over ZeroMQ: REQ/REP with a few bytes and no tensor at all."""

from __future__ import annotations

import torch
import zmq

from .base import Contender


class RawSocket(Contender):
    """A bare round trip; the tensor is not sent."""

    name = "pyzmq REQ/REP, no tensor"
    copies = "–"

    @staticmethod
    def serve(address: str, nbytes: int) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        socket.bind(address)
        print("ready", flush=True)
        while True:
            socket.send(socket.recv())

    def connect(self, address: str, nbytes: int) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        self._socket.connect(address)

    def call(self, value: int) -> torch.Tensor:
        self._socket.send(bytes((value,)) * 48)
        return torch.tensor(self._socket.recv()[0] + 1, dtype=torch.uint8)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()
