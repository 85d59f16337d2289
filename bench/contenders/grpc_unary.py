"""gRPC over a Unix socket, with the raw bytes of a tensor as a message."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ..harness.contender import Contender, PrivateTensors
from ..harness.content import respond, view

_METHOD = "/bench.Tensor/Answer"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class GrpcUnary(Contender):
    """A unary method without protobuf: a message is the tensor's bytes."""

    name = "grpcio"
    how = "unary method over unix:, raw bytes instead of protobuf, message limits lifted, one handler thread"
    copies = "12: each way tobytes, slice, kernel in, kernel out, slice, bytes"
    reply = "view of private bytes"
    packages = (("grpc", "grpcio"),)
    in_flight = 3

    def make_endpoint(self) -> str:
        self._address = f"unix:{self.directory}/s"
        return self._address

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        import grpc

        tensors = PrivateTensors(1)

        def answer(message: bytes, _context: Any) -> np.ndarray[Any, Any]:
            request = view(message)
            reply = tensors.next(request.nbytes)
            respond(request, reply)
            return reply.numpy()

        handler = grpc.unary_unary_rpc_method_handler(answer, response_serializer=lambda array: array.tobytes())
        service = grpc.method_handlers_generic_handler("bench.Tensor", {"Answer": handler})
        server = grpc.server(ThreadPoolExecutor(1), handlers=(service,), options=_UNLIMITED)
        server.add_insecure_port(endpoint)
        server.start()
        try:
            ready()
            server.wait_for_termination()
        finally:
            server.stop(None)

    def connect(self) -> None:
        import grpc

        self._channel = grpc.insecure_channel(self._address, options=_UNLIMITED)
        grpc.channel_ready_future(self._channel).result(timeout=10)
        self._call = self._channel.unary_unary(_METHOD, request_serializer=lambda array: array.tobytes())
        self._tensors = PrivateTensors(1)  # sending serialises it at once
        self._pending: deque[Any] = deque()

    def prepare(self, nbytes: int) -> torch.Tensor:
        self._request = self._tensors.next(nbytes)
        return self._request

    def send(self) -> None:
        self._pending.append(self._call.future(self._request.numpy()))

    def receive(self) -> torch.Tensor:
        return view(self._pending.popleft().result())

    def close(self) -> None:
        self._channel.close()
