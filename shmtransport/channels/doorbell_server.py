"""The server's end of the doorbell channel, beside the ZeroMQ channel of its other clients.

A thread can't wait for a bell and for file descriptors at once. So a relay thread waits for one of them and wakes
the server by the other:

* ``ThreadDoorbells``, for a server with its own thread: the server waits for the bell, the relay for ZeroMQ.
* ``LoopDoorbells``, for an event loop: the loop waits for descriptors, the relay for the bell.

Messages are taken from doorbell clients and from ZeroMQ in turn, so neither can starve the other. The rules of the
channel itself are in ``doorbell``.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque

from ..core import Bell, MessageRing, Patience
from ..errors import MessageTooLarge, OutOfResources, PeerProtocolError
from . import relay
from .backlog import BoundedQueue
from .base import BrokenPeer, ServerChannel
from .zmq import ZmqServerChannel


class _DoorbellPeer:
    """One client's message ring, and the messages that it has no room for."""

    def __init__(self, client_key: bytes, ring: MessageRing) -> None:
        self.client_key = client_key
        self.ring = ring
        self.queue = BoundedQueue()

    def send(self, data: bytes) -> bool:
        """Send or queue one message; return False if too much is queued."""
        if not self.queue and self.ring.write(data):
            return True
        within_limits = self.queue.add(data)
        self.ring.want_room(True)
        self.flush()
        return within_limits

    def flush(self) -> None:
        """Send the queued messages that there is room for."""
        if self.queue.flush(self.ring.write):
            self.ring.want_room(False)

    def receive(self) -> bytes | None:
        """Return the client's next message, or None if there is none now."""
        if self.queue:
            self.flush()
        return self.ring.read()


class DoorbellServerChannel(ServerChannel):
    """The server's end for doorbell clients, and by way of ``base`` for all others.

    ``connect`` makes a client a doorbell client. While ``in_use`` is False, a server may use ``base`` directly.

    Args:
        base: the ZeroMQ channel.
        patience: how long a wait polls before it blocks.
    """

    def __init__(self, base: ZmqServerChannel, patience: Patience) -> None:
        self._base = base
        self.patience = patience
        self.bell = Bell()
        self._relay: relay.Relay | None = None
        self._peers: dict[bytes, _DoorbellPeer] = {}
        self._in_turn: tuple[_DoorbellPeer, ...] = ()
        self._rings: tuple[MessageRing, ...] = ()
        self._last = -1  # index of the peer that was read last
        self._base_first = False

    @property
    def in_use(self) -> bool:
        """Whether a doorbell client is connected or connecting."""
        return self._relay is not None

    def prepare(self) -> None:
        """Do what the first doorbell client needs, before it is told that it is connected.

        Raises:
            OutOfResources: the relay thread can't be started.
        """
        if self._relay is None:
            try:
                self._relay = self._start_relay()
            except RuntimeError as error:
                raise OutOfResources(f"the doorbell channel needs a thread: {error}") from error

    def channel_of(self, client_key: bytes) -> str:
        """Return the name of the channel that a client uses."""
        return "doorbell" if client_key in self._peers else "zmq"

    def connect(self, client_key: bytes, ring: MessageRing) -> None:
        """Route a client's messages through its ring from now on, after ``prepare``.

        Args:
            client_key: the client, as ZeroMQ names it.
            ring: the message rings of both segments.
        """
        self._peers[client_key] = _DoorbellPeer(client_key, ring)
        self._take_turns()

    def disconnect(self, client_key: bytes) -> None:
        self._base.disconnect(client_key)
        peer = self._peers.pop(client_key, None)
        if peer is None:
            return
        peer.ring.end()
        self._take_turns()
        self.stop_if_unused()

    def _take_turns(self) -> None:
        self._in_turn = tuple(self._peers.values())
        self._rings = tuple(peer.ring for peer in self._in_turn)

    def stop_if_unused(self) -> None:
        """Stop the relay if no doorbell client is left, for example after a failed handshake."""
        if self._relay is not None and not self._peers:
            self._relay.stop()
            self._relay = None

    def send(self, client_key: bytes, data: bytes) -> bool:
        peer = self._peers.get(client_key)
        if peer is None:
            return self._base.send(client_key, data)
        try:
            return peer.send(data)
        except PeerProtocolError as error:
            raise BrokenPeer(client_key, error) from error
        except MessageTooLarge:  # a goodbye with a long reason; replies keep to the agreed size
            return False

    def receive(self) -> tuple[bytes, bytes] | None:
        self._base_first = not self._base_first
        if self._base_first:
            return self._receive_from_base() or self._receive_from_peers()
        return self._receive_from_peers() or self._receive_from_base()

    @property
    def sender_pid(self) -> int | None:
        return self._base.sender_pid

    def know(self, client_key: bytes) -> None:
        self._base.know(client_key)

    def watch(self, descriptor: int) -> None:
        self._base.watch(descriptor)

    def unwatch(self, descriptor: int) -> None:
        self._base.unwatch(descriptor)

    def fileno(self) -> int:
        return self._base.fileno()

    @property
    def wake_descriptor(self) -> int:
        return self._base.wake_descriptor

    def wake(self) -> None:
        self._base.wake()

    def abandon(self) -> None:
        self._base.abandon()
        self._relay = None
        self._peers.clear()
        self._take_turns()

    def remove_names(self) -> None:
        self._base.remove_names()

    def close(self, *, flush: bool = True) -> None:
        for client_key in list(self._peers):
            self.disconnect(client_key)
        self.stop_if_unused()
        self._base.close(flush=flush)

    def take_readable(self) -> list[int]:
        """Return the readable descriptors that the relay has seen and ``wait`` has not returned yet."""
        return []

    @abstractmethod
    def _start_relay(self) -> relay.Relay:
        """Start the thread that waits for what the server's own thread does not wait for.

        Raises:
            RuntimeError: the thread can't be started.
        """

    def _receive_from_base(self) -> tuple[bytes, bytes] | None:
        return self._base.receive()

    def _receive_from_peers(self) -> tuple[bytes, bytes] | None:
        peers = self._in_turn
        turn = self._last
        for _ in peers:
            turn = turn + 1 if turn + 1 < len(peers) else 0
            peer = peers[turn]
            try:
                data = peer.receive()
            except PeerProtocolError as error:
                raise BrokenPeer(peer.client_key, error) from error
            if data is not None:
                self._last = turn
                return peer.client_key, data
        return None

    def _peers_readable(self) -> bool:
        for peer in self._in_turn:  # noqa: SIM110 - any() takes several times as long, and this is the spin loop
            if peer.ring.readable():
                return True
        return False


class ThreadDoorbells(DoorbellServerChannel):
    """For a server with its own thread, which waits for the bell; the relay waits for ZeroMQ."""

    def __init__(self, base: ZmqServerChannel, patience: Patience) -> None:
        super().__init__(base, patience)
        # Written by the relay, read here:
        self.attention = bytearray(b"\1")
        """1 while there may be something else than messages of doorbell clients; 0 otherwise."""
        self._readable: deque[int] = deque()

    @property
    def clients(self) -> int:
        """How many doorbell clients are connected."""
        return len(self._in_turn)

    @property
    def is_queue_empty(self) -> bool:
        """Whether no message waits for room in a ring."""
        for peer in self._in_turn:  # noqa: SIM110 - any() takes several times as long
            if peer.queue:
                return False
        return True

    @property
    def _base_readable(self) -> bool:
        return self.attention[0] != 0

    @_base_readable.setter
    def _base_readable(self, readable: bool) -> None:
        self.attention[0] = readable

    def send(self, client_key: bytes, data: bytes) -> bool:
        if client_key not in self._peers:
            self._base_readable = True  # sending can consume the edge-triggered event that the relay waits for
        return super().send(client_key, data)

    def receive(self) -> tuple[bytes, bytes] | None:
        if self._relay is not None and not self._base_readable:
            return self._receive_from_peers()
        return super().receive()

    def wait(self, timeout_s: float | None) -> list[int]:
        if self._relay is None:
            readable = self.take_readable()
            return [*readable, *self._base.wait(0 if readable else timeout_s)]  # seen by the relay before it ended
        if not self._has_work() and not self._polled():
            self._sleep(relay.SLICE_S if timeout_s is None else min(timeout_s, relay.SLICE_S))
        return self.take_readable()

    def _polled(self) -> bool:
        """Poll for as long as it pays; whether there is something to do."""
        spin_s = self.patience.seconds()
        if not spin_s:
            return False
        deadline = time.perf_counter() + spin_s
        while not (found := self._has_work()) and time.perf_counter() < deadline:
            pass
        self.patience.learn(found)
        return found

    def _has_work(self) -> bool:
        return self._peers_readable() or self._base_readable or bool(self._readable)

    def _sleep(self, timeout_s: float) -> None:
        """Block until there is a post, having said so to all clients."""
        for ring in self._rings:
            ring.sleep(True)
        try:
            if not self._has_work():
                self.waits += 1
                self.bell.wait(self._rings, timeout_s)
        finally:
            for ring in self._rings:
                ring.sleep(False)

    def _start_relay(self) -> relay.Relay:
        def post_for_base() -> None:
            self._readable.extend(self._base.poll(None))
            self._base_readable = True
            self.bell.post()

        self._base_readable = True  # its event may have been consumed already
        return relay.Relay("shmtransport zmq", post_for_base, self._base.wake)

    def _receive_from_base(self) -> tuple[bytes, bytes] | None:
        self._base_readable = False  # first: what comes from now on is received here, or the relay sets it again
        received = super()._receive_from_base()
        if received is not None:
            self._base_readable = True
        return received

    def take_readable(self) -> list[int]:
        taken = []
        while self._readable:
            taken.append(self._readable.popleft())
        return taken


class LoopDoorbells(DoorbellServerChannel):
    """For an event loop, which waits for descriptors; the relay waits for the bell."""

    def connect(self, client_key: bytes, ring: MessageRing) -> None:
        super().connect(client_key, ring)
        ring.sleep(True)  # the relay always waits
        self.bell.post()  # from now on for this client too

    def wait(self, timeout_s: float | None) -> list[int]:
        return self._base.wait(timeout_s)

    def _start_relay(self) -> relay.Relay:
        def wake_event_loop() -> None:
            if self.bell.wait(self._rings, relay.SLICE_S) or self._peers_readable():
                self._base.wake()

        return relay.Relay("shmtransport doorbell", wake_event_loop, self.bell.post)
