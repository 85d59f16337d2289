"""ZeroMQ sockets of both sides, for the contenders and floors that use them bare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import zmq

from .base import Contender


class Sockets(Contender):
    """A server's and a client's socket of the given kinds at an ``ipc://`` address of their own."""

    client_kind: ClassVar[int] = zmq.REQ
    server_kind: ClassVar[int] = zmq.REP

    def link(self) -> str:
        self._address = f"ipc://{self.directory}/s"
        return self._address

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        with zmq.Context() as context, context.socket(self.server_kind) as socket:
            socket.linger = 0
            socket.bind(link)
            ready()
            while True:
                self.answer(socket)

    def answer(self, socket: zmq.Socket[bytes]) -> None:
        """In the server's process: one call."""
        raise NotImplementedError

    def connect(self) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(self.client_kind)
        self._socket.linger = 0
        self._socket.connect(self._address)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
