"""What the transport replaces: tensors as bytes in MessagePack over REQ/REP."""

from __future__ import annotations

import msgpack
import numpy as np
import torch
import zmq

from .base import Contender


def _dump(tensor: torch.Tensor) -> bytes:
    array = tensor.numpy()
    packed: bytes = msgpack.packb({"data": array.tobytes(), "shape": list(array.shape), "dtype": str(array.dtype)})
    return packed


def _load(data: bytes) -> torch.Tensor:
    message = msgpack.unpackb(data)
    array = np.frombuffer(message["data"], dtype=message["dtype"]).reshape(message["shape"])
    return torch.from_numpy(array.copy())


class Original(Contender):
    """msgpack and ``tobytes``, as in the system that this project started from."""

    name = "pyzmq + msgpack"
    copies = "18"  # each way: tobytes, packer, bytes, message, kernel in and out, bytes, unpack, array

    @staticmethod
    def serve(address: str, nbytes: int) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        socket.bind(address)
        print("ready", flush=True)
        while True:
            socket.send(_dump(_load(socket.recv()) + 1))

    def connect(self, address: str, nbytes: int) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        self._socket.connect(address)
        self._tensor = torch.empty((nbytes,), dtype=torch.uint8)

    def call(self, value: int) -> torch.Tensor:
        self._socket.send(_dump(self._tensor.fill_(value)))
        return _load(self._socket.recv())

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()
