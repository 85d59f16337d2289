"""Queues of messages for receivers that have fallen behind, each in order; no I/O.

Rules that it keeps:

* What one peer may leave unread is bounded, in messages and in bytes. Beyond that, ``add`` returns False and its caller
  drops the peer.
* What is kept for departed clients is bounded for all of them together: a client that reconnects again and again can't
  make it grow.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial

QUEUE_LIMIT = 10_000
"""The most messages queued for a peer that does not read."""
QUEUED_BYTES_LIMIT = 16 << 20
"""The most bytes queued for a peer that does not read."""
LEAVING_BYTES_LIMIT = 1 << 20
"""The most bytes kept for one departed client; a longer queue is dropped when the client departs."""
LEAVING_LIMIT = 64
"""Undelivered messages are kept for this many departed clients, the most recent ones."""


class BoundedQueue:
    """Messages that one peer has not read yet, oldest first."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, data: bytes) -> bool:
        """Queue one message; return False if that makes more than a peer may leave unread."""
        self._messages.append(data)
        self.nbytes += len(data)
        return len(self._messages) <= QUEUE_LIMIT and self.nbytes <= QUEUED_BYTES_LIMIT

    def flush(self, send: Callable[[bytes], bool | None]) -> bool | None:
        """Send the oldest messages until ``send`` returns something other than True.

        Returns:
            True if no message is left, otherwise what ``send`` returned for the first that is.
        """
        while self._messages:
            sent = send(self._messages[0])
            if not sent:
                return sent
            self.nbytes -= len(self._messages.popleft())
        return True


class Backlogs:
    """The queues of all clients for which messages wait.

    ``send(client_key, data)`` tries to send a message. It returns True if it did, False if the client is gone, and None
    if there is no room now.
    """

    def __init__(self, send: Callable[[bytes, bytes], bool | None]) -> None:
        self._send = send
        self._queues: OrderedDict[bytes, BoundedQueue] = OrderedDict()
        self._leaving: OrderedDict[bytes, BoundedQueue] = OrderedDict()

    def __len__(self) -> int:
        """Return how many clients have messages waiting."""
        return len(self._queues) + len(self._leaving)

    def __contains__(self, client_key: bytes) -> bool:
        return client_key in self._queues or client_key in self._leaving

    def add(self, client_key: bytes, data: bytes) -> bool:
        """Queue one message; return False if the client has left too much unread or has departed."""
        if client_key in self._leaving:
            return False
        queue = self._queues.setdefault(client_key, BoundedQueue())
        return queue.add(data)

    def leave(self, client_key: bytes) -> None:
        """Mark a client as departed. What waits for it is still sent, up to ``LEAVING_BYTES_LIMIT``."""
        queue = self._queues.pop(client_key, None)
        if queue is None or queue.nbytes > LEAVING_BYTES_LIMIT:
            return
        self._leaving[client_key] = queue
        if len(self._leaving) > LEAVING_LIMIT:
            self._leaving.popitem(last=False)

    def flush(self) -> None:
        """Send to every client the messages that there is room for."""
        for queues in (self._queues, self._leaving):
            for client_key in list(queues):
                self._flush(queues, client_key)

    def flush_next(self) -> None:
        """Send the messages that there is room for to one client, the next in turn."""
        queues = self._queues or self._leaving
        client_key = next(iter(queues), None)
        if client_key is not None:
            queues.move_to_end(client_key)
            self._flush(queues, client_key)

    def _flush(self, queues: OrderedDict[bytes, BoundedQueue], client_key: bytes) -> None:
        if queues[client_key].flush(partial(self._send, client_key)) is not None:  # all is sent, or the client is gone
            del queues[client_key]
