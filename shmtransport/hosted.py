"""What a server holds for each of its clients, and how all of it is given back where the server was not closed."""

from __future__ import annotations

import atexit
import contextlib
import warnings
import weakref

import msgspec

from .channel import BrokenPeer, ServerChannel
from .errors import Closed
from .handshake import Admitted
from .message import Goodbye, encode
from .protocol import Call, ServerProtocol
from .statistics import Counters


class HostedClient:
    """One connected client; ``number`` is never used for another."""

    def __init__(self, identity: bytes, number: int, admitted: Admitted, counters: Counters) -> None:
        self.identity = identity
        self.number = number
        self.sizes, self.connection = admitted
        self.protocol = ServerProtocol(self.connection.codec, counters)
        self.reference = weakref.ref(self)
        self.gone = False
        self.heard = False
        self.in_progress = 0


class Arrival(msgspec.Struct):
    """A call that has come, and whose it is."""

    client: HostedClient
    call: Call


def drop_all(channel: ServerChannel, clients: dict[bytes, HostedClient], address: str) -> None:
    """Give back what a server held that was dropped without being closed; may run inside a garbage collection."""
    with contextlib.suppress(BrokenPeer, Closed):
        for identity in clients:
            channel.send(identity, encode(Goodbye("the server was dropped")))
    channel.close(flush=False)
    for client in clients.values():
        client.connection.close()
    warnings.warn(
        f"the server at {address} was dropped without being closed: call close(), or use it in a 'with' block",
        ResourceWarning,
        stacklevel=2,
    )


_channels: weakref.WeakSet[ServerChannel] = weakref.WeakSet()


def remove_names_at_exit(channel: ServerChannel) -> None:
    """As the process exits, leave nothing in the file system of a server that was not closed."""
    _channels.add(channel)


@atexit.register
def _remove_names() -> None:
    for channel in list(_channels):
        channel.remove_names()
