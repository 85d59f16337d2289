"""Peers that speak for themselves: bare sockets, before the handshake and after it."""

from __future__ import annotations

import zmq

from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    AnyMessage,
    Attach,
    Hello,
    Message,
    Offer,
    Welcome,
    decode,
    encode,
)


def hello(arena_bytes: int) -> Hello:
    """A proper first message that asks for two arenas of this size."""
    return Hello(arena_bytes, arena_bytes, DEFAULT_MAX_MESSAGE_BYTES)


HELLO = hello(4096)


class Stranger:
    """A bare DEALER socket that says what it likes."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 1000
        self._socket.connect(address)

    def send(self, *frames: bytes | Message) -> None:
        self._socket.send_multipart([frame if isinstance(frame, bytes) else encode(frame) for frame in frames])

    def receive_bytes(self, timeout_s: float = 5.0) -> bytes | None:
        return self._socket.recv() if self._socket.poll(int(timeout_s * 1000)) else None

    def receive(self, timeout_s: float = 5.0) -> AnyMessage | None:
        data = self.receive_bytes(timeout_s)
        return None if data is None else decode(data)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Intruder(Stranger):
    """A stranger that has finished the handshake and then breaks the rules."""

    def __init__(self, address: str, arena_bytes: int = 64 * 1024) -> None:
        super().__init__(address)
        self.send(hello(arena_bytes))
        assert isinstance(self.receive(), Offer)
        self.segment = Segment.create(segment_layout(arena_bytes))
        self.send(Attach(self.segment.name))
        welcome = self.receive()
        assert isinstance(welcome, Welcome)
        self.replies = Segment.attach(welcome.segment, segment_layout(arena_bytes))

    def close(self) -> None:
        self.segment.close()
        self.replies.close()
        super().close()
