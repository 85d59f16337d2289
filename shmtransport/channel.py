"""Channels carry encoded control messages: whole, in order, and no tensor byte.

``Channel`` is a client's end, ``ServerChannel`` the server's end for all of its clients. ZeroMQ's are in
``zmq_channel``; the doorbell's, behind the same interface, in ``doorbell``. A channel belongs to one thread at a time,
except for what says otherwise.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from .errors import PeerProtocolError


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
    def close(self, *, flush: bool, wait: bool = False) -> None:
        """Give the channel back; with ``flush``, what is queued still goes out for a moment.

        With ``wait`` this waits until it has; without, it never waits. A second call does nothing.
        """


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
    sender_pid: int | None = None
    """The process that sent what ``receive`` returned last, if ``know`` was not called for that peer."""

    @abstractmethod
    def know(self, peer: bytes) -> None:
        """Ask no more which process this peer's messages come from, until ``disconnect``."""

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
    def remove_names(self) -> None:
        """Remove what other processes find this server by; safe while another thread uses the channel."""

    @abstractmethod
    def abandon(self) -> None:
        """In a forked child: forget the parent's channel without touching it."""

    @abstractmethod
    def close(self, *, flush: bool = True) -> None:
        """Give the channel back and remove its socket file; with ``flush``, let what is queued go out for a moment.

        A second call does nothing.
        """


def deadline_in(timeout_s: float | None) -> float:
    """A point on the monotonic clock, ``timeout_s`` seconds from now; None never comes."""
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s
