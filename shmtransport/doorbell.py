"""The doorbell channel: messages through the ring in each side's segment, a semaphore to wake whoever waits.

Rules that it keeps:

* whoever publishes a message rings; whoever takes a message takes one ring back. So nobody has to say that it sleeps,
  and no order between two processes' stores and loads matters here;
* waiting first looks, for ``spin_us`` microseconds, then blocks in the kernel. It blocks in slices: a ring that a
  hostile peer has taken away costs the others one slice;
* a writer never blocks. What the ring has no room for is the client's to send again, and is queued by the server;
* the handshake, and so every new client, comes by ZeroMQ. While there are doorbells to wait for, a second thread
  waits for ZeroMQ and rings; in an event loop it is the other way round.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from .backlog import QUEUE_LIMIT, QUEUED_BYTES_LIMIT
from .bell import Bell
from .channel import BrokenPeer, Channel, ServerChannel
from .connection import Bells
from .errors import MessageTooLarge, OutOfResources, PeerProtocolError
from .message_ring import MessageRing

_SLICE_S = 0.5


class _Relay:
    """A thread that turns one way of being woken into another: ``step`` again and again, until ``stop``."""

    def __init__(self, name: str, step: Callable[[], None], interrupt: Callable[[], None]) -> None:
        self._step = step
        self._interrupt = interrupt
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            self._step()

    def stop(self) -> None:
        self._stopping = True
        self._interrupt()
        if self._thread is not threading.current_thread():  # as a garbage collection in it would be
            self._thread.join()


class DoorbellChannel(Channel):
    """A client's end.

    ``handshake_channel`` is the one by which the connection was made; it stays open for as long as this, and takes
    the last goodbye.
    """

    kind = "doorbell"
    looks_first = True

    def __init__(self, handshake_channel: Channel, ring: MessageRing, bells: Bells, spin_us: float) -> None:
        self._handshake_channel = handshake_channel
        self._ring = ring
        self._own_bell, self._peer_bell = bells
        self._spin_s = spin_us * 1e-6
        self._wants_room = False
        self._untaken = 0  # rings of messages that were found by looking
        self._relay: _Relay | None = None
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
        self._peer_bell.ring()
        return True

    def receive(self) -> bytes | None:
        data = self._ring.read()
        if data is None:
            if self._event_fd < 0:
                return None
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event_fd)
            data = self._ring.read()  # what came before the descriptor was cleared
            if data is None:
                return None
        self._untaken += 1
        if self._ring.made_room:
            self._ring.made_room = False
            self._peer_bell.ring()
        return data

    def wait(self, timeout_s: float) -> bool:
        ring = self._ring
        while self._untaken and self._own_bell.take():
            self._untaken -= 1
        if ring.wait_readable(time.perf_counter() + self._spin_s if self._spin_s else 0.0):
            return False
        rung = self._own_bell.wait(min(max(timeout_s, 0.0), _SLICE_S))
        if rung and ring.readable():
            self._untaken -= 1
        return True

    def wake(self) -> None:
        if not self._closed:
            self._own_bell.ring()

    def fileno(self) -> int:
        if self._event_fd < 0:
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._relay = _Relay("shmtransport doorbell", self._wake_event_loop, self._own_bell.ring)
        return self._event_fd

    def ended(self) -> bool:
        return self._ring.ended()

    def say_goodbye(self, data: bytes) -> None:
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
        self._own_bell.close()
        self._handshake_channel.close(flush=flush, wait=wait)

    def _wake_event_loop(self) -> None:
        rung = self._own_bell.wait(_SLICE_S)
        if rung or self._ring.readable() or self._ring.ended():
            os.eventfd_write(self._event_fd, 1)


class _Line:
    """One client's ring and bell, and what its ring had no room for."""

    def __init__(self, peer: bytes, ring: MessageRing, bell: Bell) -> None:
        self.peer = peer
        self.ring = ring
        self.bell = bell
        self.queue: deque[bytes] = deque()
        self.queued_bytes = 0

    def send(self, data: bytes) -> bool:
        """Send or queue one message; False if too much is queued."""
        if not self.queue and self.ring.write(data):
            self.bell.ring()
            return True
        self.queue.append(data)
        self.queued_bytes += len(data)
        self.ring.want_room(True)
        self.flush()
        return len(self.queue) <= QUEUE_LIMIT and self.queued_bytes <= QUEUED_BYTES_LIMIT

    def flush(self) -> None:
        """Send what was queued, as far as there is room."""
        while self.queue and self.ring.write(self.queue[0]):
            self.queued_bytes -= len(self.queue.popleft())
            self.bell.ring()
        if not self.queue:
            self.ring.want_room(False)


class DoorbellServerChannel(ServerChannel):
    """The server's end for clients of both kinds: those that ``connect`` was called for, and all others by ``base``.

    Without a doorbell client it is its ``base`` and nothing else.
    """

    def __init__(self, base: ServerChannel, spin_us: float) -> None:
        self._base = base
        self._spin_s = spin_us * 1e-6
        self._bell: Bell | None = None
        self._lines: dict[bytes, _Line] = {}
        self._in_turn: tuple[_Line, ...] = ()
        self._last = -1  # whose turn it was
        self._base_first = False
        self._untaken = 0  # rings of messages that were found by looking
        self._relay: _Relay | None = None
        self._in_event_loop = False
        # Written by the relay, read here:
        self._base_due = True
        self._readable: deque[int] = deque()

    def bell(self) -> Bell:
        """What wakes this server; made when a doorbell client comes, and gone with the last one.

        Raises:
            SegmentError: the system has no semaphore to give.
            OutOfResources: the thread that waits beside it can't be started.
        """
        if self._bell is None:
            bell = Bell.create()
            try:
                self._relay = self._start_relay(bell)
            except RuntimeError as error:
                bell.close()
                raise OutOfResources(f"the doorbell channel needs a thread: {error}") from error
            self._bell = bell
        return self._bell

    def kind_of(self, peer: bytes) -> str:
        """Which kind of channel a client uses."""
        return "doorbell" if peer in self._lines else "zmq"

    def connect(self, peer: bytes, ring: MessageRing, bell: Bell) -> None:
        """From now on this client's messages come by its ring."""
        self._lines[peer] = _Line(peer, ring, bell)
        self._in_turn = tuple(self._lines.values())

    def know(self, peer: bytes) -> None:
        self._base.know(peer)

    def disconnect(self, peer: bytes) -> None:
        self._base.disconnect(peer)
        line = self._lines.pop(peer, None)
        if line is None:
            return
        line.ring.end()
        line.bell.ring()
        self._in_turn = tuple(self._lines.values())
        self.drop_unused_bell()

    def drop_unused_bell(self) -> None:
        """Give the bell back if there is no doorbell client, as after a handshake that failed."""
        if not self._lines:
            self._stop_relay()
            self._close_bell()

    def send(self, peer: bytes, data: bytes) -> bool:
        line = self._lines.get(peer)
        if line is None:
            sent = self._base.send(peer, data)
            self._base_due = True  # sending may take the edge away that the relay waits for
            return sent
        try:
            return line.send(data)
        except PeerProtocolError as error:
            raise BrokenPeer(peer, error) from error
        except MessageTooLarge:  # no reply, which is held to what was agreed: a goodbye with a long reason
            return False

    def receive(self) -> tuple[bytes, bytes] | None:
        if self._relay is None:
            return self._receive_base()
        if self._base_due or self._in_event_loop:
            self._base_first = not self._base_first  # neither kind of client can keep the other waiting
            if self._base_first:
                return self._receive_from_base() or self._receive_from_lines()
            return self._receive_from_lines() or self._receive_from_base()
        return self._receive_from_lines()

    def watch(self, descriptor: int) -> None:
        self._base.watch(descriptor)

    def unwatch(self, descriptor: int) -> None:
        self._base.unwatch(descriptor)

    def wait(self, timeout_s: float | None) -> list[int]:
        if self._relay is None or self._in_event_loop:
            readable = self._take_readable()
            timeout_s = 0 if readable else timeout_s  # what the relay saw before its end is not to wait for more
            self.waits += timeout_s != 0
            return [*readable, *self._base.wait(timeout_s)]
        bell = self.bell()
        while self._untaken and bell.take():
            self._untaken -= 1
        deadline = time.perf_counter() + self._spin_s if self._spin_s else 0.0
        while not self._due():
            if time.perf_counter() >= deadline:
                self.waits += 1
                rung = bell.wait(_SLICE_S if timeout_s is None else min(timeout_s, _SLICE_S))
                if rung and self._lines_readable():
                    self._untaken -= 1
                break
        return self._take_readable()

    def fileno(self) -> int:
        self._in_event_loop = True
        return self._base.fileno()

    @property
    def wake_descriptor(self) -> int:
        return self._base.wake_descriptor

    def wake(self) -> None:
        self._base.wake()

    def abandon(self) -> None:
        self._base.abandon()
        if self._bell is not None:
            self._bell.abandon()
        self._relay = None
        self._lines.clear()
        self._in_turn = ()

    def remove_names(self) -> None:
        self._base.remove_names()
        bell = self._bell
        if bell is not None:
            bell.unlink()

    def close(self, *, flush: bool = True) -> None:
        for peer in list(self._lines):
            self.disconnect(peer)
        self.drop_unused_bell()
        self._base.close(flush=flush)

    def _receive_from_base(self) -> tuple[bytes, bytes] | None:
        self._base_due = False  # before looking: what comes now is seen here, or the relay says so again
        received = self._receive_base()
        if received is not None:
            self._base_due = True
        return received

    def _receive_base(self) -> tuple[bytes, bytes] | None:
        received = self._base.receive()
        self.sender_pid = self._base.sender_pid
        return received

    def _receive_from_lines(self) -> tuple[bytes, bytes] | None:
        lines = self._in_turn
        turn = self._last
        for _ in lines:
            turn = turn + 1 if turn + 1 < len(lines) else 0
            line = lines[turn]
            ring = line.ring
            try:
                if line.queue:
                    line.flush()
                data = ring.read()
            except PeerProtocolError as error:
                raise BrokenPeer(line.peer, error) from error
            if data is not None:
                self._last = turn
                self._untaken += 1
                if ring.made_room:
                    ring.made_room = False
                    line.bell.ring()
                return line.peer, data
        return None

    def _lines_readable(self) -> bool:
        for line in self._in_turn:  # noqa: SIM110 - any() takes several times as long, and this is what spins
            if line.ring.readable():
                return True
        return False

    def _due(self) -> bool:
        return self._lines_readable() or self._base_due or bool(self._readable)

    def _take_readable(self) -> list[int]:
        taken = []
        while self._readable:
            taken.append(self._readable.popleft())
        return taken

    def _start_relay(self, bell: Bell) -> _Relay:
        if self._in_event_loop:
            return _Relay("shmtransport doorbell", lambda: self._wake_event_loop(bell), bell.ring)
        return _Relay("shmtransport zmq", lambda: self._ring_for_base(bell), self._base.wake)

    def _stop_relay(self) -> None:
        if self._relay is not None:
            self._relay.stop()
            self._relay = None

    def _close_bell(self) -> None:
        if self._bell is not None:
            self._bell.close()
            self._bell = None
        self._untaken = 0

    def _ring_for_base(self, bell: Bell) -> None:
        self._readable.extend(self._base.wait(None))
        self._base_due = True
        bell.ring()

    def _wake_event_loop(self, bell: Bell) -> None:
        if bell.wait(_SLICE_S) or self._lines_readable():
            self._base.wake()
