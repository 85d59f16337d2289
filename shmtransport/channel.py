"""Channels carry encoded control messages: whole, in order, and no tensor byte.

``Channel`` is a client's end, ``ServerChannel`` the server's end for all of its clients. ZeroMQ is the one kind here;
another is a class behind the same interface.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable

import zmq

from . import address as addresses
from .errors import AddressError, CallTimeout, Closed

_GOODBYE_LINGER_MS = 500
_QUEUE_LIMIT = 10_000


class Channel(ABC):
    """A client's end."""

    kind: str

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Queue one message; never blocks for the peer.

        Raises:
            CallTimeout: the peer reads nothing, and the queue is full.
        """

    @abstractmethod
    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None after ``timeout_s`` seconds without one."""

    @abstractmethod
    def close(self, *, flush: bool) -> None:
        """Give the channel back; with ``flush``, let what is queued go out for a moment. A second call does nothing."""


class ServerChannel(ABC):
    """The server's end, for all of its clients; ``peer`` names one of them."""

    kind: str

    @abstractmethod
    def send(self, peer: bytes, data: bytes) -> bool:
        """Queue one message; False if that client is gone or does not read."""

    @abstractmethod
    def receive(self) -> tuple[bytes, bytes] | None:
        """The next message and who sent it, or None if there is none now."""

    @abstractmethod
    def wait(self, descriptors: Iterable[int], timeout_s: float | None) -> list[int]:
        """Block until a message or one of these descriptors is readable, or the time is up; which descriptors are."""

    @property
    @abstractmethod
    def wake_descriptor(self) -> int:
        """A non-blocking file descriptor; whatever byte is written to it makes ``wait`` return."""

    @abstractmethod
    def wake(self) -> None:
        """Make ``wait`` return; may be called from a signal handler or any thread."""

    @abstractmethod
    def close(self) -> None:
        """Give the channel back and remove its socket file. A second call does nothing."""


class ZmqChannel(Channel):
    """DEALER socket; its own ZeroMQ context, so that nothing is shared with the caller's."""

    kind = "zmq"

    def __init__(self, address: str, max_message_bytes: int) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.maxmsgsize = max_message_bytes
        self._socket.sndhwm = self._socket.rcvhwm = _QUEUE_LIMIT
        self._socket.linger = 0  # a client that is dropped without close() must not hang in a garbage collection
        self._timeout_ms = -1
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close(flush=False)
            raise AddressError(f"can't connect to {address}: {error.strerror}") from error

    def send(self, data: bytes) -> None:
        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            raise CallTimeout(f"{_QUEUE_LIMIT} messages are queued and the server reads none: is it stopped?") from None
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error

    def receive(self, timeout_s: float) -> bytes | None:
        timeout_ms = max(int(timeout_s * 1000), 0)
        if timeout_ms != self._timeout_ms:
            self._socket.rcvtimeo = self._timeout_ms = timeout_ms
        try:
            return self._socket.recv()
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise Closed(f"the channel is closed: {error.strerror}") from error

    def close(self, *, flush: bool) -> None:
        self._socket.close(_GOODBYE_LINGER_MS if flush else 0)
        self._context.term()


class ZmqServerChannel(ServerChannel):
    """ROUTER socket, with a pipe beside it to be woken by."""

    kind = "zmq"

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
        self._socket.sndhwm = self._socket.rcvhwm = _QUEUE_LIMIT
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
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
        try:
            self._socket.send_multipart((peer, data), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise Closed(f"the channel is closed: {error.strerror}") from error
        return True

    def receive(self) -> tuple[bytes, bytes] | None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            except zmq.ZMQError as error:
                raise Closed(f"the channel is closed: {error.strerror}") from error
            if len(frames) == 2:
                return frames[0], frames[1]

    def wait(self, descriptors: Iterable[int], timeout_s: float | None) -> list[int]:
        watched: list[tuple[zmq.Socket[bytes] | int, int]] = [
            (self._socket, zmq.POLLIN),
            (self._wake_reader, zmq.POLLIN),
        ]
        watched += [(descriptor, zmq.POLLIN) for descriptor in descriptors]
        ready = [found for found, _ in zmq.zmq_poll(watched, -1 if timeout_s is None else int(timeout_s * 1000))]
        if self._wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 4096)
        return [found for found in ready if isinstance(found, int) and found != self._wake_reader]

    @property
    def wake_descriptor(self) -> int:
        return self._wake_writer

    def wake(self) -> None:
        if not self._closed:
            with contextlib.suppress(BlockingIOError):  # full: it will wake
                os.write(self._wake_writer, b"\0")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._bound:  # before the socket is closed: after that the file may be a successor's
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._socket.close()
        self._context.term()
        os.close(self._wake_reader)
        os.close(self._wake_writer)


def deadline_in(timeout_s: float | None) -> float:
    """A point on the monotonic clock, ``timeout_s`` seconds from now; None never comes."""
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s
