"""ZeroMQ sockets on both sides, for the contenders and floors that use nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import zmq

from ..harness.contender import Contender


class Sockets(Contender):
    """A server's and a client's socket of the given types, at an ``ipc://`` address in the directory."""

    client_socket_type: ClassVar[int] = zmq.REQ
    server_socket_type: ClassVar[int] = zmq.REP

    def make_endpoint(self) -> str:
        self._address = f"ipc://{self.directory}/s"
        return self._address

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        with zmq.Context() as context, context.socket(self.server_socket_type) as socket:
            socket.linger = 0
            socket.bind(endpoint)
            ready()
            while True:
                self.answer(socket)

    def answer(self, socket: zmq.Socket[bytes]) -> None:
        """In the server: answer one call."""
        raise NotImplementedError

    def connect(self) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(self.client_socket_type)
        self._socket.linger = 0
        self._socket.connect(self._address)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
