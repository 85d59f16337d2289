"""What this project replaces: the bytes of tensors in MessagePack over ZeroMQ's REQ/REP."""

from __future__ import annotations

import msgpack
import numpy as np
import torch
import zmq

from ..harness.contender import PrivateTensors
from ..harness.content import respond
from .sockets import Sockets


def dump(tensor: torch.Tensor) -> bytes:
    """The bytes that the original sends for a tensor; bfloat16, which numpy lacks, travels as int16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array = tensor.numpy()
    packed: bytes = msgpack.packb({"data": array.tobytes(), "shape": list(array.shape), "dtype": str(array.dtype)})
    return packed


def load(data: bytes) -> torch.Tensor:
    """The tensor that ``dump`` encoded, as a private copy."""
    message = msgpack.unpackb(data)
    array = np.frombuffer(message["data"], dtype=message["dtype"]).reshape(message["shape"])
    return torch.from_numpy(array.copy())


class Original(Sockets):
    """``tobytes`` and msgpack, as in the original system."""

    name = "pyzmq + msgpack"
    how = "the original's way: tobytes, msgpack, REQ/REP over ipc, unpack, copy"
    copies = "16: each way tobytes, packer, bytes, message, kernel in, kernel out, unpack, array.copy"
    reply = "private copy"
    packages = (("msgpack", "msgpack"), ("zmq", "pyzmq"))

    def answer(self, socket: zmq.Socket[bytes]) -> None:
        request = load(socket.recv())
        reply = self._tensors.next(request.nbytes)
        respond(request, reply)
        socket.send(dump(reply))

    def __init__(self, directory: str, max_nbytes: int) -> None:
        super().__init__(directory, max_nbytes)
        self._tensors = PrivateTensors(1)

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._tensors.next(nbytes)
        return self._request

    def send(self) -> None:
        self._socket.send(dump(self._request))

    def receive(self) -> torch.Tensor:
        return load(self._socket.recv())
