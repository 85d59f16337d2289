"""The client's end of the doorbell channel: message rings in shared memory, and a bell.

Rules that both ends keep (the server's is in ``doorbell_server``):

* A side that is about to block announces it in its ring, then looks for a message once more. A side that has written a
  message posts the peer if it sleeps. A post may be left over: the next wait takes it and returns early.
* A wait first polls, for as long as that pays or ``spin_us`` says, then blocks in the kernel. It blocks in slices, so
  that a peer that never posts delays it by one slice.
* A writer never blocks. When the ring is full, the client's ``send`` returns False; the server queues the message.
* The handshake, and so every new client, comes by ZeroMQ.
"""

from __future__ import annotations

import contextlib
import os
import time

from ..core import Bell, MessageRing, Patience
from ..errors import PeerProtocolError
from . import relay
from .base import Channel


class DoorbellChannel(Channel):
    """A client's end.

    Args:
        handshake_channel: the channel that the connection was made over. It stays open as long as this one, and carries
            the goodbye if the ring is full.
        ring: the message rings of both segments.
        patience: how long a wait polls before it blocks.
    """

    name = "doorbell"
    looks_first = True

    def __init__(self, handshake_channel: Channel, ring: MessageRing, patience: Patience) -> None:
        self._handshake_channel = handshake_channel
        self._ring = ring
        self.bell = Bell()
        self.patience = patience
        self._wants_room = False
        self._relay: relay.Relay | None = None
        self._event_fd = -1
        self._closed = False

    def send(self, data: bytes) -> bool:
        if not self._ring.write(data):
            self._wants_room = True
            self._ring.want_room(True)
            if not self._ring.write(data):
                return False
        if self._wants_room:
            self._wants_room = False
            self._ring.want_room(False)
        return True

    def receive(self) -> bytes | None:
        data = self._ring.read()
        if data is None:
            if self._event_fd < 0:
                return None
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event_fd)
            data = self._ring.read()  # what came before the event was cleared
        return data

    def wait(self, timeout_s: float) -> bool:
        ring = self._ring
        spin_s = self.patience.seconds()
        found = ring.wait_readable(time.perf_counter() + spin_s if spin_s else 0.0)
        if spin_s:
            self.patience.learn(found)
        if found:
            return False
        ring.sleep(True)
        try:
            if ring.readable() or ring.ended():
                return False
            self.bell.wait((ring,), min(max(timeout_s, 0.0), relay.SLICE_S))
        finally:
            if not self._closed:  # as in a child that was forked meanwhile
                ring.sleep(self._relay is not None)
        return True

    def wake(self) -> None:
        if not self._closed:
            self.bell.post()

    def fileno(self) -> int:
        if self._event_fd < 0:
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._ring.sleep(True)
            self._relay = relay.Relay("shmtransport doorbell", self._wake_event_loop, self.bell.post)
        return self._event_fd

    def ended(self) -> bool:
        return self._ring.ended()

    def say_goodbye(self, data: bytes) -> None:
        """Say it behind what was sent before, if there is room; on the other channel it would overtake that."""
        said = False
        with contextlib.suppress(PeerProtocolError):
            said = not self._closed and self.send(data)
        if not said:
            self._handshake_channel.say_goodbye(data)

    def abandon(self) -> None:
        self._closed = True
        self._handshake_channel.abandon()

    def close(self, *, flush: bool, wait: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        if self._relay is not None:
            self._relay.stop()
            os.close(self._event_fd)
        self._ring.end()
        self._handshake_channel.close(flush=flush, wait=wait)

    def _wake_event_loop(self) -> None:
        posted = self.bell.wait((self._ring,), relay.SLICE_S)
        if posted or self._ring.readable() or self._ring.ended():
            os.eventfd_write(self._event_fd, 1)
