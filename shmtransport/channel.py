"""Channels carry encoded control messages: whole, in order, and no tensor byte.

``Channel`` is a client's end, ``ServerChannel`` the server's end for all of its clients. ZeroMQ's are here; the
doorbell's, behind the same interface, are in ``doorbell``. A channel belongs to one thread at a time, except for what
says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from abc import ABC, abstractmethod

import zmq

from . import address as addresses
from .alarm import Alarm
from .backlog import QUEUE_LIMIT as QUEUE_LIMIT
from .backlog import QUEUED_BYTES_LIMIT, Backlogs
from .errors import AddressError, Closed, PeerProtocolError
from .message import is_reply

_GOODBYE_LINGER_MS = 500
_RETRY_S = 0.01
_HELD_BYTES = 2 << 20
"""What ZeroMQ itself holds for or of one peer of a server: it frees none of that before the peer's socket goes."""
_FEWEST_HELD = 8
_LONGEST_WAIT_MS = 1 << 30  # poll takes no more than an int


class Channel(ABC):
    """A client's end.

    ``looks_first`` says that ``wait`` itself sees what has come already; otherwise ``receive`` must have found nothing.
    """

    kind: str
    looks_first = False

    @abstractmethod
    def send(self, data: bytes) -> bool:
        """Queue one message without blocking; False if the peer must read on before there is room."""

    @abstractmethod
    def receive(self) -> bytes | None:
        """The next message, or None if there is none now.

        Raises:
            PeerProtocolError: what the peer has put in its place can't be one.
        """

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` seconds until something may have come or ``wake`` was called.

        Another thread may send and receive meanwhile. Returns whether the kernel had to be waited in.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make ``wait`` return; may be called from any thread."""

    @abstractmethod
    def fileno(self) -> int:
        """A file descriptor for an event loop: whenever it becomes readable, and after each ``send``, ``receive``."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether the peer has left without a word that could still be received."""

    @abstractmethod
    def say_goodbye(self, data: bytes) -> None:
        """Send a last message if there is a way to."""

    @abstractmethod
    def abandon(self) -> None:
        """In a forked child: forget the parent's channel without touching it."""

    @abstractmethod
    def close(self, *, flush: bool) -> None:
        """Give the channel back; with ``flush``, let what is queued go out for a moment. A second call does nothing."""


class BrokenPeer(Exception):
    """What a client has put in place of a message can't be one; ``peer`` says which client."""

    def __init__(self, peer: bytes, error: PeerProtocolError) -> None:
        super().__init__(peer, error)
        self.peer = peer
        self.error = error

    def __str__(self) -> str:
        return str(self.error)


class ServerChannel(ABC):
    """The server's end, for all of its clients; ``peer`` names one of them.

    ``waits`` is how often ``wait`` had to block in the kernel.
    """

    waits = 0

    @abstractmethod
    def send(self, peer: bytes, data: bytes) -> bool:
        """Queue one message; False if that client is gone or does not read."""

    @abstractmethod
    def disconnect(self, peer: bytes) -> None:
        """This client is gone or has to go; its last messages are still sent if it reads."""

    @abstractmethod
    def receive(self) -> tuple[bytes, bytes] | None:
        """The next message and who sent it, or None if there is none now.

        Raises:
            BrokenPeer: a client must be dropped.
        """

    @abstractmethod
    def watch(self, descriptor: int) -> None:
        """Have ``wait`` return this file descriptor once it has become readable."""

    @abstractmethod
    def unwatch(self, descriptor: int) -> None:
        """Look at a descriptor no longer."""

    @abstractmethod
    def wait(self, timeout_s: float | None) -> list[int]:
        """Wait until something may have come, the time is up, or ``wake``; which watched descriptors became readable.

        To be called only when ``receive`` has nothing; each readable descriptor is returned once.
        """

    @abstractmethod
    def fileno(self) -> int:
        """A file descriptor for an event loop: whenever it becomes readable, ``wait(0)`` and ``receive`` are due."""

    @property
    @abstractmethod
    def wake_descriptor(self) -> int:
        """A non-blocking file descriptor; whatever byte is written to it makes ``wait`` return."""

    @abstractmethod
    def wake(self) -> None:
        """Make ``wait`` return; may be called from a signal handler or any thread."""

    @abstractmethod
    def abandon(self) -> None:
        """In a forked child: forget the parent's channel without touching it."""

    @abstractmethod
    def close(self) -> None:
        """Give the channel back and remove its socket file. A second call does nothing."""


class ZmqChannel(Channel):
    """DEALER socket; its own ZeroMQ context, so that nothing is shared with the caller's."""

    kind = "zmq"

    def __init__(self, address: str, max_message_bytes: int) -> None:
        self._closed = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.maxmsgsize = max_message_bytes
        self._socket.sndhwm = QUEUE_LIMIT
        self._socket.rcvhwm = max(QUEUED_BYTES_LIMIT // max_message_bytes, _FEWEST_HELD)
        self._socket.linger = 0  # a client that is dropped without close() must not hang in a garbage collection
        self._fd = int(self._socket.get(zmq.FD))
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._poll.register(self._wake_fd, select.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close(flush=False)
            raise AddressError(f"can't connect to {address}: {error.strerror}") from error

    def send(self, data: bytes) -> bool:
        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return True

    def receive(self) -> bytes | None:
        # Looking is also what re-arms ``fileno``; recv() would raise for nothing, which takes longer.
        try:
            if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                return self._socket.recv(zmq.DONTWAIT)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return None

    def wait(self, timeout_s: float) -> bool:
        ready = self._poll.poll(min(max(timeout_s * 1000, 0), _LONGEST_WAIT_MS))
        if len(ready) > 1 or (ready and ready[0][0] == self._wake_fd):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        return True

    def wake(self) -> None:
        if not self._closed:
            os.eventfd_write(self._wake_fd, 1)

    def fileno(self) -> int:
        return self._fd

    def ended(self) -> bool:
        return False

    def say_goodbye(self, data: bytes) -> None:
        self.send(data)

    def abandon(self) -> None:
        self._closed = True

    def close(self, *, flush: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._socket.close(_GOODBYE_LINGER_MS if flush else 0)
        self._context.term()
        os.close(self._wake_fd)


class ZmqServerChannel(ServerChannel):
    """ROUTER socket, with a pipe beside it to be woken by.

    Everything is waited for by one epoll object, edge-triggered: so another thread may do the waiting, and tell this
    one, without the two having to take turns.
    """

    def __init__(self, address: str, max_message_bytes: int) -> None:
        transport = addresses.check_bind(address)
        self._address = address
        self._bound = False
        self._closed = False
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = max_message_bytes
        self._socket.linger = _GOODBYE_LINGER_MS
        self._socket.router_mandatory = True
        self._socket.sndhwm = self._socket.rcvhwm = max(_HELD_BYTES // max_message_bytes, _FEWEST_HELD)
        self._backlogs = Backlogs(self._send)
        self._retry = Alarm()
        self._fd = int(self._socket.get(zmq.FD))
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._own_descriptors = (self._fd, self._wake_reader, self._retry.fileno())
        self._epoll = select.epoll()
        for descriptor in self._own_descriptors:
            self.watch(descriptor)
        mask = os.umask(0o177)  # the socket file is never open to others, not for a moment
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"can't bind {address}: {error.strerror}") from error
        finally:
            os.umask(mask)
        self._bound = transport == "ipc"

    @property
    def _path(self) -> str:
        return self._address[len(addresses.IPC) :]

    def send(self, peer: bytes, data: bytes) -> bool:
        if self._closed:
            return False
        if peer not in self._backlogs:
            sent = self._send(peer, data)
            if sent is not None:
                return sent
            if not is_reply(data):  # a stranger's answer, perhaps: nothing is kept for strangers
                return False
        return self._backlogs.add(peer, data)

    def disconnect(self, peer: bytes) -> None:
        self._backlogs.leave(peer)

    def receive(self) -> tuple[bytes, bytes] | None:
        if self._closed:
            return None
        received = self._receive()
        if self._backlogs:
            if received is not None:
                self._backlogs.flush_next()
            else:
                received = self._flush()
        return received

    def _flush(self) -> tuple[bytes, bytes] | None:
        """Send what there is room for; a message that has come meanwhile.

        That there is room again for one peer ZeroMQ may tell while it is asked about another, or about messages, and
        then not once more: so this is tried again after a while, too.
        """
        self._backlogs.flush()
        if self._backlogs:
            self._retry.set(_RETRY_S)
        return self._receive()  # sending may have taken away what would have told of a message

    def _receive(self) -> tuple[bytes, bytes] | None:
        try:
            if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
                # A message in several parts is none of ours: an empty one takes its place, and is refused.
                return frames[0], frames[1] if len(frames) == 2 else b""
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return None

    def _send(self, peer: bytes, data: bytes) -> bool | None:
        """Hand one message to ZeroMQ: True if that was done, False if the peer is gone, None if there is no room."""
        try:
            self._socket.send_multipart((peer, data), zmq.DONTWAIT)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return True

    def _flush_for(self, timeout_s: float) -> None:
        """Give those that do read so much time to read what waits for them."""
        deadline = time.monotonic() + timeout_s
        self._backlogs.flush()
        while self._backlogs and time.monotonic() < deadline:
            time.sleep(_RETRY_S)
            self._socket.get(zmq.EVENTS)  # lets ZeroMQ see who has read on
            self._backlogs.flush()

    def watch(self, descriptor: int) -> None:
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)

    def wait(self, timeout_s: float | None) -> list[int]:
        ready = [descriptor for descriptor, _ in self._epoll.poll(timeout_s)]
        if self._wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 4096)
        return [descriptor for descriptor in ready if descriptor not in self._own_descriptors]

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def wake_descriptor(self) -> int:
        return self._wake_writer

    def wake(self) -> None:
        if not self._closed:
            with contextlib.suppress(BlockingIOError):  # full: it will wake
                os.write(self._wake_writer, b"\0")

    def abandon(self) -> None:
        self._closed = True

    def close(self) -> None:
        if self._closed:
            return
        if self._bound and self._backlogs:
            self._flush_for(_GOODBYE_LINGER_MS / 1000)
        self._closed = True
        if self._bound:  # before the socket is closed: after that the file may be a successor's
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._socket.close()
        self._context.term()
        self._epoll.close()
        self._retry.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)


def deadline_in(timeout_s: float | None) -> float:
    """A point on the monotonic clock, ``timeout_s`` seconds from now; None never comes."""
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s
