"""Messages that wait until their receivers have read on, each receiver's in order; integers and bytes only, no I/O.

Rules that it keeps:

* what one peer may leave unread is bounded, in messages and in bytes; beyond that ``add`` says so, and the peer has
  to go;
* what is kept for peers that are clients no more is bounded for all of them together: one that comes again and again
  can't make it grow.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

QUEUE_LIMIT = 10_000
"""The most messages that are queued for a peer that does not read."""
QUEUED_BYTES_LIMIT = 16 << 20
"""The most bytes of messages that are queued for a peer that does not read."""
LEAVING_BYTES_LIMIT = 1 << 20
LEAVING_LIMIT = 64
"""Of so many peers that are clients no more, the last ones, so many bytes each are kept until they have been read."""


class _Queue:
    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.nbytes = 0


class Backlogs:
    """The queues of all peers that have one.

    ``send(peer, data)`` tries to send a message: True if that was done, False if the peer is gone, None if there is
    no room for it now.
    """

    def __init__(self, send: Callable[[bytes, bytes], bool | None]) -> None:
        self._send = send
        self._queues: OrderedDict[bytes, _Queue] = OrderedDict()
        self._leaving: OrderedDict[bytes, _Queue] = OrderedDict()

    def __len__(self) -> int:
        """How many peers have messages waiting."""
        return len(self._queues) + len(self._leaving)

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._queues or peer in self._leaving

    def add(self, peer: bytes, data: bytes) -> bool:
        """Queue one message; False if this peer has left too much unread, or is a client no more."""
        if peer in self._leaving:
            return False
        queue = self._queues.setdefault(peer, _Queue())
        queue.messages.append(data)
        queue.nbytes += len(data)
        return len(queue.messages) <= QUEUE_LIMIT and queue.nbytes <= QUEUED_BYTES_LIMIT

    def leave(self, peer: bytes) -> None:
        """This peer is a client no more; what waits for it is still sent, unless that is too much."""
        queue = self._queues.pop(peer, None)
        if queue is None or queue.nbytes > LEAVING_BYTES_LIMIT:
            return
        self._leaving[peer] = queue
        if len(self._leaving) > LEAVING_LIMIT:
            self._leaving.popitem(last=False)

    def flush(self) -> None:
        """Send what there is room for, to everyone."""
        for queues in (self._queues, self._leaving):
            for peer in list(queues):
                self._flush(queues, peer)

    def flush_next(self) -> None:
        """As ``flush``, for the one peer whose turn it is."""
        queues = self._queues or self._leaving
        peer = next(iter(queues), None)
        if peer is not None:
            queues.move_to_end(peer)
            self._flush(queues, peer)

    def _flush(self, queues: OrderedDict[bytes, _Queue], peer: bytes) -> None:
        queue = queues[peer]
        while queue.messages:
            sent = self._send(peer, queue.messages[0])
            if sent is None:
                return
            if not sent:
                break
            queue.nbytes -= len(queue.messages.popleft())
        del queues[peer]
