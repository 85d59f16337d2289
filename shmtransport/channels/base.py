"""The interfaces of channels, which carry encoded control messages whole and in order.

``Channel`` is a client's end; ``ServerChannel`` is the server's end for all of its clients. ``zmq`` implements them
over ZeroMQ, ``doorbell`` and ``doorbell_server`` over message rings in shared memory. A channel belongs to one thread
at a time, except where a method says otherwise.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from ..errors import PeerProtocolError


class Channel(ABC):
    """A client's end.

    Attributes:
        name: "zmq" or "doorbell".
        looks_first: True if ``wait`` also reports messages that are already there. Otherwise call ``receive`` until it
            returns None, and only then ``wait``.
    """

    name: str
    looks_first = False

    @abstractmethod
    def send(self, data: bytes) -> bool:
        """Send one message without blocking; return False if there is no room now.

        Raises:
            Closed: the channel is closed.
        """

    @abstractmethod
    def receive(self) -> bytes | None:
        """Return the next message, or None if there is none now.

        Raises:
            PeerProtocolError: the peer has written something that can't be a message.
            Closed: the channel is closed.
        """

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` seconds for a message or a call of ``wake``; may return early.

        Another thread may send and receive during the wait.

        Returns:
            Whether the wait blocked in the kernel.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make ``wait`` return. May be called from any thread."""

    @abstractmethod
    def fileno(self) -> int:
        """Return a file descriptor for an event loop.

        Call ``receive`` whenever the descriptor becomes readable, and after each ``send``.
        """

    @abstractmethod
    def ended(self) -> bool:
        """Return whether the peer closed its end and everything it sent has been read."""

    @abstractmethod
    def say_goodbye(self, data: bytes) -> None:
        """Send a last message, if there is room for it."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget the parent's channel in a forked child, without touching it."""

    @abstractmethod
    def close(self, *, flush: bool, wait: bool = False) -> None:
        """Close the channel. A second call does nothing.

        Args:
            flush: let queued messages go out for a moment longer.
            wait: with ``flush``, wait until they have gone out. Default: don't.
        """


class BrokenPeer(Exception):
    """The client named by ``client_key`` has written something that can't be a message."""

    def __init__(self, client_key: bytes, error: PeerProtocolError) -> None:
        super().__init__(client_key, error)
        self.client_key = client_key
        self.error = error

    def __str__(self) -> str:
        return str(self.error)


class ServerChannel(ABC):
    """The server's end for all of its clients; a ``client_key`` names one of them.

    Attributes:
        waits: how often ``wait`` had to block in the kernel.
    """

    waits = 0

    @property
    @abstractmethod
    def sender_pid(self) -> int | None:
        """The process that sent the message ``receive`` returned last.

        None if the kernel can't tell; not looked up for clients that ``know`` was called for.
        """

    @abstractmethod
    def know(self, client_key: bytes) -> None:
        """Stop looking up which process sends this client's messages, until ``disconnect``."""

    @abstractmethod
    def send(self, client_key: bytes, data: bytes) -> bool:
        """Send or queue one message; return False if the client is gone or does not read.

        Raises:
            BrokenPeer: the client must be dropped.
            Closed: the channel is closed.
        """

    @abstractmethod
    def disconnect(self, client_key: bytes) -> None:
        """Forget a client that is gone or must go.

        Over ZeroMQ, what was queued for it is still sent if it reads.
        """

    @abstractmethod
    def receive(self) -> tuple[bytes, bytes] | None:
        """Return the sender's ``client_key`` and the next message, or None if there is none now.

        Raises:
            BrokenPeer: a client must be dropped.
            Closed: the channel is closed.
        """

    @abstractmethod
    def watch(self, descriptor: int) -> None:
        """Make ``wait`` return this file descriptor when it becomes readable."""

    @abstractmethod
    def unwatch(self, descriptor: int) -> None:
        """Stop watching a file descriptor."""

    @abstractmethod
    def wait(self, timeout_s: float | None) -> list[int]:
        """Wait for a message, a watched descriptor or a call of ``wake``; may return early.

        Call it only when ``receive`` has returned None.

        Args:
            timeout_s: how long to wait, in seconds; None: no limit.

        Returns:
            The watched descriptors that became readable, each once.
        """

    @abstractmethod
    def fileno(self) -> int:
        """Return a file descriptor for an event loop.

        Call ``wait(0)`` and ``receive`` whenever it becomes readable.
        """

    @property
    @abstractmethod
    def wake_descriptor(self) -> int:
        """A non-blocking file descriptor; any byte written to it makes ``wait`` return."""

    @abstractmethod
    def wake(self) -> None:
        """Make ``wait`` return. May be called from a signal handler or any thread."""

    @abstractmethod
    def remove_names(self) -> None:
        """Remove the names by which other processes find this server.

        May be called while another thread uses the channel.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Forget the parent's channel in a forked child, without touching it."""

    @abstractmethod
    def close(self, *, flush: bool = True) -> None:
        """Close the channel and remove its socket file. A second call does nothing.

        Args:
            flush: let queued messages go out for a moment longer.
        """


def deadline_in(timeout_s: float | None) -> float:
    """Return the monotonic time ``timeout_s`` seconds from now; infinity for None."""
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s
