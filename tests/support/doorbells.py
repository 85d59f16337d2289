"""A server's doorbell channel and clients of both kinds in one process, over real segments and sockets."""

from __future__ import annotations

import os
import threading
from collections.abc import Container

from shmtransport.channels.doorbell import DoorbellChannel
from shmtransport.channels.doorbell_server import DoorbellServerChannel, ThreadDoorbells
from shmtransport.channels.zmq import ZmqChannel, ZmqServerChannel
from shmtransport.core import MessageRing, Patience
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import Segment

from .rings import Forger, record_bytes

MAX_MESSAGE_BYTES = 1020  # a record of 1 KiB, two of which fill a ring


class Caller:
    """A client by doorbell.

    ``name`` is what the server knows it by, ``ring`` and ``server_ring`` the two ends of the message ring;
    ``forger`` and ``server_forger`` write into either side's segment without any rule.
    """

    def __init__(self, party: Party, name: bytes, spin_us: float) -> None:
        self.name = name
        layout = segment_layout(1, party.max_message_bytes)
        self._segments = [Segment.create(layout), Segment.create(layout)]
        self._segments += [Segment.attach(segment.name, layout) for segment in self._segments]
        of_client, of_server, seen_by_server, seen_by_client = self._segments
        self.ring = MessageRing(of_client.message_ring, seen_by_client.message_ring)
        self.server_ring = MessageRing(of_server.message_ring, seen_by_server.message_ring)
        ring_bytes = 2 * record_bytes(party.max_message_bytes)
        self.forger, self.server_forger = Forger(of_client, ring_bytes), Forger(of_server, ring_bytes)
        self.channel = DoorbellChannel(
            ZmqChannel(party.address, party.max_message_bytes),
            self.ring,
            Patience(spin_us * 1e-6),
        )

    def connect(self, party: Party) -> None:
        party.server.prepare()
        party.server.connect(self.name, self.server_ring)

    def close(self) -> None:
        self.channel.close(flush=False)
        for segment in self._segments:
            segment.close()


class Party:
    """The server, over ``base`` for ZeroMQ, and its clients; ``close`` ends all of them."""

    def __init__(
        self,
        address: str,
        spin_us: float = 0.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        doorbells: type[DoorbellServerChannel] = ThreadDoorbells,
    ) -> None:
        self.address = address
        self.max_message_bytes = max_message_bytes
        self.base = ZmqServerChannel(address, max_message_bytes)
        self.server = doorbells(self.base, Patience(spin_us * 1e-6))
        self._callers: list[Caller] = []
        self._zmq: list[ZmqChannel] = []

    def caller(self, name: bytes = b"caller", spin_us: float = 0.0) -> Caller:
        """Connect a client by doorbell."""
        made = Caller(self, name, spin_us)
        self._callers.append(made)
        made.connect(self)
        return made

    def zmq_client(self) -> ZmqChannel:
        """Connect a client by ZeroMQ."""
        self._zmq.append(ZmqChannel(self.address, self.max_message_bytes))
        return self._zmq[-1]

    def next_message(self) -> tuple[bytes, bytes]:
        """The server's next message and who sent it; waits for it as a server does."""
        while (received := self.server.receive()) is None:
            self.server.wait(None)
        return received

    def close(self) -> None:
        self.server.close()
        for caller in self._callers:
            caller.close()
        for channel in self._zmq:
            channel.close(flush=False)
        self._callers.clear()
        self._zmq.clear()


def next_message(caller: Caller) -> bytes:
    """A client's next message; waits for it as a client does."""
    while (received := caller.channel.receive()) is None:
        caller.channel.wait(60.0)
    return received


def all_messages(caller: Caller) -> list[bytes]:
    """All that a client can receive now."""
    messages = []
    while (received := caller.channel.receive()) is not None:
        messages.append(received)
    return messages


def relays(besides: Container[threading.Thread]) -> list[str]:
    """The names of the relay threads that run, but for these threads."""
    names = (thread.name for thread in threading.enumerate() if thread not in besides)
    return [name for name in names if name in ("shmtransport zmq", "shmtransport doorbell")]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
