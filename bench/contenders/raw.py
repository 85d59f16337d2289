"""REQ/REP over ZeroMQ, and the floor of every transport that signals over it: a few bytes and no tensor at all."""

from __future__ import annotations

from abc import abstractmethod

import torch
import zmq

from .base import Contender

_REQUEST_BYTES, _REPLY_BYTES = 45, 31  # what a call of ours with a tensor each way takes


class RequestReply(Contender):
    """The sockets of both sides; what is sent is the subclass's."""

    @staticmethod
    @abstractmethod
    def answer(request: bytes) -> bytes:
        """In the server's process: the reply's bytes."""

    @classmethod
    def serve(cls, address: str, nbytes: int) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        socket.bind(address)
        print("ready", flush=True)
        while True:
            socket.send(cls.answer(socket.recv()))

    def connect(self, address: str, nbytes: int) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        self._socket.connect(address)
        self._tensor = torch.empty((nbytes,), dtype=torch.uint8)

    def ask(self, request: bytes) -> bytes:
        """One round trip of bytes."""
        self._socket.send(request)
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


class DealerRouter(RequestReply):
    """A bare round trip of the bytes that one of our calls takes, by the kinds of sockets that we use."""

    name = "pyzmq DEALER/ROUTER, no tensor"
    copies = "–"

    @staticmethod
    def answer(request: bytes) -> bytes:
        return request[:_REPLY_BYTES]

    @classmethod
    def serve(cls, address: str, nbytes: int) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.bind(address)
        print("ready", flush=True)
        while True:
            identity, request = socket.recv_multipart()
            socket.send_multipart((identity, cls.answer(request)))

    def connect(self, address: str, nbytes: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(address)

    def call(self, value: int) -> torch.Tensor:
        return torch.tensor(self.ask(bytes((value,)) * _REQUEST_BYTES)[0] + 1, dtype=torch.uint8)


class RawSocket(RequestReply):
    """A bare round trip; the tensor is not sent."""

    name = "pyzmq REQ/REP, no tensor"
    copies = "–"

    @staticmethod
    def answer(request: bytes) -> bytes:
        return request

    def call(self, value: int) -> torch.Tensor:
        return torch.tensor(self.ask(bytes((value,)) * 48)[0] + 1, dtype=torch.uint8)
