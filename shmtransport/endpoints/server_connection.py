"""What a server holds for each client, and how it is given back if the server is not closed."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections import deque
from typing import Any

import msgspec

from ..channels.base import BrokenPeer, ServerChannel
from ..core import Counters
from ..errors import Closed
from ..protocol.calls import Call, ServerProtocol
from ..protocol.messages import Goodbye, encode
from .connection_memory import warn_of_drop
from .handshake import Admitted

_MOST_DEFERRED = 1024


class ServerConnection:
    """One connected client.

    Args:
        client_key: ZeroMQ's key of the client.
        connection_id: the connection's number, which is never reused for another.
        admitted: the client's arena sizes and segments.
        counters: where the connection counts.
    """

    def __init__(self, client_key: bytes, connection_id: int, admitted: Admitted, counters: Counters) -> None:
        self.client_key = client_key
        self.connection_id = connection_id
        self.sizes, self.memory = admitted
        self.lend = self.memory.send_arena.lend
        self.protocol = ServerProtocol(self.memory.codec, counters)
        self.reference = weakref.ref(self)
        self.gone = False
        self.heard = False
        self.has_left = False
        """Whether it no longer owned its segment when the server last looked."""
        self.in_progress = 0
        """Calls that have begun and are not answered."""
        self.streams: dict[int, Any] = {}
        """What has not ended, by the call's id: a ``Server``'s streams, all calls of an ``AsyncServer``."""
        self.deferred: deque[Any] = deque()
        """Results that wait for room in the reply arena, oldest first."""
        self.deferred_bytes = 0

    @property
    def is_saturated(self) -> bool:
        """Whether as many results wait for room as may: no more should be made."""
        return self.deferred_bytes >= self.sizes.reply_arena_bytes or len(self.deferred) >= _MOST_DEFERRED

    @property
    def may_have_room(self) -> bool:
        """Whether room for a result can come: from the client, or from another call's result that is being made."""
        return not self.gone and (self.memory.send_arena.held_by_peer > 0 or self.in_progress > 1)


class IncomingCall(msgspec.Struct):
    """A received call, the connection that it came by, and the size of its message.

    ``take`` gives the call away, so that its arguments live no longer than its handler holds them.
    """

    connection: ServerConnection
    call_id: int
    is_answered: bool
    nbytes: int
    box: list[Call]
    cancelled: bool = False

    def take(self) -> Call:
        """Return the call, once."""
        return self.box.pop()


def drop_all(channel: ServerChannel, connections: dict[bytes, ServerConnection], address: str) -> None:
    """Release what a server held that was dropped unclosed; may run in a garbage collection.

    Args:
        channel: the server's channel.
        connections: its connections, by ``client_key``.
        address: its address, for the warning.
    """
    with contextlib.suppress(BrokenPeer, Closed):
        for client_key in connections:
            channel.send(client_key, encode(Goodbye("the server was dropped")))
    channel.close(flush=False)
    for connection in connections.values():
        connection.memory.close()
    warn_of_drop(f"the server at {address}")


_channels: weakref.WeakSet[ServerChannel] = weakref.WeakSet()


def remove_names_at_exit(channel: ServerChannel) -> None:
    """Have an unclosed server's names removed from the file system when the process exits."""
    _channels.add(channel)


@atexit.register
def _remove_names() -> None:
    for channel in list(_channels):
        channel.remove_names()
