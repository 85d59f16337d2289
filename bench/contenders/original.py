"""What the transport replaces: tensors as bytes in MessagePack over REQ/REP."""

from __future__ import annotations

import msgpack
import numpy as np
import torch

from .raw import RequestReply


def _dump(tensor: torch.Tensor) -> bytes:
    array = tensor.numpy()
    packed: bytes = msgpack.packb({"data": array.tobytes(), "shape": list(array.shape), "dtype": str(array.dtype)})
    return packed


def _load(data: bytes) -> torch.Tensor:
    message = msgpack.unpackb(data)
    array = np.frombuffer(message["data"], dtype=message["dtype"]).reshape(message["shape"])
    return torch.from_numpy(array.copy())


class Original(RequestReply):
    """msgpack and ``tobytes``, as in the system that this project started from."""

    name = "pyzmq + msgpack"
    copies = "18"  # each way: tobytes, packer, bytes, message, kernel in and out, bytes, unpack, array

    @staticmethod
    def answer(request: bytes) -> bytes:
        return _dump(_load(request) + 1)

    def call(self, value: int) -> torch.Tensor:
        return _load(self.ask(_dump(self._tensor.fill_(value))))
