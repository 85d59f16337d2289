"""pyzmq's fastest way to send large messages: multipart, without copies in Python."""

from __future__ import annotations

import torch
import zmq

from ..harness.contender import PrivateTensors
from ..harness.content import respond, view
from .sockets import Sockets


class Multipart(Sockets):
    """A header frame and a frame over the tensor's own memory, DEALER to ROUTER."""

    name = "pyzmq multipart, copy=False"
    how = "DEALER/ROUTER over ipc, send_multipart and recv_multipart with copy=False; tensors over frames"
    copies = "4: kernel in and kernel out, each way"
    reply = "view of a message's memory, valid while it is held"
    packages = (("zmq", "pyzmq"),)
    in_flight = 3
    client_socket_type = zmq.DEALER
    server_socket_type = zmq.ROUTER

    def __init__(self, directory: str, max_nbytes: int) -> None:
        super().__init__(directory, max_nbytes)
        # ZeroMQ's thread may still read a frame that it didn't copy while the next tensor is written.
        self._tensors = PrivateTensors(self.in_flight + 1)

    def answer(self, socket: zmq.Socket[bytes]) -> None:
        client_key, header, body = socket.recv_multipart(copy=False)
        request = view(body.buffer)
        reply = self._tensors.next(request.nbytes)
        respond(request, reply)
        socket.send_multipart((client_key, header, reply.numpy().data), copy=False)

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._tensors.next(nbytes)
        return self._request

    def send(self) -> None:
        self._socket.send_multipart((b"answer", self._request.numpy().data), copy=False)

    def receive(self) -> torch.Tensor:
        _, body = self._socket.recv_multipart(copy=False)
        return view(body.buffer)
