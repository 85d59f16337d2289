"""Clients that send and write what they like: bare sockets, raw ZMTP, and one that has finished the handshake."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import Any

import zmq

from shmtransport.core import Bell, MessageRing
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    AnyMessage,
    Attach,
    ChannelKind,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refused,
    Reply,
    Request,
    Welcome,
    decode,
    encode,
)
from tests.support.helpers import eventually
from tests.support.rings import CELL_BYTES, ENDED, Forger, record_bytes

ARENA_BYTES = 64 * 1024
ANSWER_S = 20.0
"""How long any answer may take on a slow, busy machine; whoever waits for silence waits less."""
PATHS = ("shmtransport-", "/dev/shm", "passwd", ".py")
"""What no reason that a server gives may contain."""


def as_bytes(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else encode(message)


def request(*arguments: Any, method: str = "echo", call_id: int = 0) -> Request:
    return Request(call_id, method, list(arguments), {}, ())


class Wire:
    """A bare DEALER socket."""

    def __init__(self, context: zmq.Context[Any], address: str, *, queue: int = 10_000) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.linger = 200
        self.socket.sndhwm = self.socket.rcvhwm = queue
        self.socket.connect(address)

    def send(self, *frames: Message | bytes) -> None:
        self.socket.send_multipart([as_bytes(frame) for frame in frames])

    def hear(self, timeout_s: float = ANSWER_S) -> AnyMessage | None:
        if not self.socket.poll(int(timeout_s * 1000)):
            return None
        return decode(self.socket.recv())

    def ask(self, message: Message | bytes) -> AnyMessage | None:
        """Send one message and take the answer."""
        self.send(message)
        return self.hear()

    def assert_refused(self, message: Message | bytes) -> str:
        """Check that the server refuses, with a reason that reveals nothing of its own; return the reason."""
        answer = self.ask(message)
        assert isinstance(answer, (Refused, Goodbye)), f"{as_bytes(message)!r} was answered with {answer}"
        assert answer.reason
        assert len(answer.reason) < 700
        assert answer.reason.isprintable()
        assert not [path for path in PATHS if path in answer.reason], answer.reason
        return answer.reason

    def close(self) -> None:
        self.socket.close()


class Raw:
    """A stream socket that speaks ZMTP 3.0 by itself, byte by byte."""

    GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address.removeprefix("ipc://"))  # the server lets it wait while many others connect
        self.socket.settimeout(ANSWER_S)

    def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server has closed it already
            self.socket.sendall(data)

    def greet(self, identity: bytes = b"") -> None:
        """Finish the handshake of ZMTP, not that of shmtransport."""
        self.write(self.GREETING)
        heard = self.hear_all(b"NULL")
        properties = ((b"Socket-Type", b"DEALER"), (b"Identity", identity))
        ready = b"\x05READY" + b"".join(
            bytes([len(key)]) + key + struct.pack(">I", len(value)) + value for key, value in properties
        )
        self.write(b"\x06" + struct.pack(">Q", len(ready)) + ready)
        end = b"Identity" + bytes(4)
        assert end in heard or end in self.hear_all(end)

    def say(self, data: bytes, *, more: bool = False) -> None:
        self.write(bytes([2 | more]) + struct.pack(">Q", len(data)) + data)

    def hear_all(self, until: bytes, timeout_s: float = ANSWER_S) -> bytes:
        """Read until these bytes have come, the connection is closed or the time is up; return all of it."""
        received, deadline = b"", time.monotonic() + timeout_s
        while until not in received and (left_s := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left_s)
            try:
                data = self.socket.recv(65536)
            except (TimeoutError, ConnectionResetError):
                break
            if not data:
                break
            received += data
        return received

    def is_closed(self, timeout_s: float = ANSWER_S) -> bool:
        """Whether the server closes the connection."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left_s)
            try:
                if not self.socket.recv(65536):
                    return True
            except ConnectionResetError:
                return True
            except TimeoutError:
                break
        return False

    def close(self) -> None:
        self.socket.close()


class Impostor:
    """A client that has finished the handshake, by either channel, and keeps to no rule from then on.

    ``wire`` is its ZeroMQ socket, ``segment`` its own segment and ``replies`` the server's; with the doorbell channel
    ``ring`` is its end of the message ring, ``forger`` writes into it without any rule.
    """

    def __init__(
        self,
        wire: Wire,
        channel: ChannelKind,
        arena_bytes: int = ARENA_BYTES,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self.wire = wire
        self.channel = channel
        offer = wire.ask(Hello(arena_bytes, arena_bytes, max_message_bytes, channel))
        assert isinstance(offer, Offer), offer
        self.layout = segment_layout(arena_bytes, offer.max_message_bytes if channel == "doorbell" else 0)
        self.max_message_bytes = offer.max_message_bytes
        self.segment = Segment.create(self.layout)
        self._bell = Bell() if channel == "doorbell" else None
        welcome = wire.ask(Attach(self.segment.name))
        assert isinstance(welcome, Welcome), welcome
        self.replies = Segment.attach(welcome.segment, self.layout)
        self.segment.unlink()
        if self._bell is not None:
            self.ring = MessageRing(self.segment.message_ring, self.replies.message_ring)
            self.forger = Forger(self.segment, 2 * record_bytes(offer.max_message_bytes))

    def send(self, message: Message | bytes) -> None:
        """Send one message by this connection's channel."""
        if self._bell is None:
            self.wire.send(message)
        else:
            deadline = time.monotonic() + ANSWER_S
            while not self.ring.write(as_bytes(message)):
                assert time.monotonic() < deadline, "the server does not read"
                time.sleep(0.001)

    def hear(self, timeout_s: float = ANSWER_S) -> AnyMessage | None:
        if self._bell is None:
            return self.wire.hear(timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            last = self.ended() or time.monotonic() >= deadline
            data = self.ring.read()
            if data is not None:
                return decode(data)
            if last:
                return None
            self._bell.wait((self.ring,), 0.01)

    def ask(self, message: Message | bytes) -> AnyMessage | None:
        self.send(message)
        return self.hear()

    def ended(self) -> bool:
        """Whether the server has signalled through the ring that it ended this connection."""
        return self.replies.view[self.layout.message_ring_offset + ENDED * CELL_BYTES] != 0

    def assert_served(self) -> None:
        """Check that it is still a client whose calls are answered."""
        assert self.ask(request("still here", call_id=77)) == Reply(77, "still here", ())

    def assert_dropped(self, *, told: bool = True) -> None:
        """Check that it has lost its connection; ``told``: with a reason, where its ring still holds one."""
        if told:
            while not isinstance(answer := self.hear(), Goodbye):
                assert answer is not None, "no goodbye came"
            assert answer.reason
            assert answer.reason.isprintable()
            assert not [path for path in PATHS if path in answer.reason], answer.reason
        deadline = time.monotonic() + ANSWER_S
        while not self._is_unknown():
            assert time.monotonic() < deadline, "it is a client still"

    def _is_unknown(self) -> bool:
        """Whether the server answers that it does not know this connection."""
        if self._bell is not None:
            eventually(self.ended, within_s=0.5)  # until then the answer would come by the ring
        self.wire.send(request("who am I"))
        answer = self.wire.hear(0.5)
        return isinstance(answer, Goodbye) and "does not know" in answer.reason

    def rewrite_header(self) -> None:
        """Fill its own segment's header, which the server has read once, with noise."""
        self.segment.view[:256] = os.urandom(256)

    def close(self) -> None:
        self.wire.send(Goodbye("enough"))
        self.segment.close()
        self.replies.close()
