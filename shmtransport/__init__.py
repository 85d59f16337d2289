"""Tensors between two processes of one machine, through shared memory and without copies.

A ``Server`` registers functions, and a ``Client`` calls them; see the README for an example.

Names are imported on first use: importing torch takes seconds, and ``shmtransport ls`` or a program that only catches
errors does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .channel_kinds import CHANNEL_KINDS, ChannelKind
from .errors import (
    AddressError,
    ArenaFull,
    CallCancelled,
    CallTimeout,
    Closed,
    ConnectRefused,
    ConnectTimeout,
    DeviceError,
    LocalProtocolError,
    MessageTooLarge,
    OutOfResources,
    PeerDied,
    PeerProtocolError,
    ProtocolError,
    RemoteError,
    SegmentError,
    TensorTooLarge,
    TransportError,
)
from .version import VERSION

if TYPE_CHECKING:
    from .endpoints.async_client import AsyncClient
    from .endpoints.async_reply_stream import AsyncReplyStream
    from .endpoints.async_server import AsyncServer
    from .endpoints.client import Client
    from .endpoints.pending_reply import PendingReply, as_completed, wait
    from .endpoints.reply_stream import ReplyStream
    from .endpoints.server import Server
    from .statistics import Statistics

__version__ = VERSION

_HOMES = {
    "AsyncClient": "endpoints.async_client",
    "AsyncReplyStream": "endpoints.async_reply_stream",
    "AsyncServer": "endpoints.async_server",
    "Client": "endpoints.client",
    "PendingReply": "endpoints.pending_reply",
    "ReplyStream": "endpoints.reply_stream",
    "Server": "endpoints.server",
    "Statistics": "statistics",
    "as_completed": "endpoints.pending_reply",
    "wait": "endpoints.pending_reply",
}

__all__ = [
    "CHANNEL_KINDS",
    "AddressError",
    "ArenaFull",
    "AsyncClient",
    "AsyncReplyStream",
    "AsyncServer",
    "CallCancelled",
    "CallTimeout",
    "ChannelKind",
    "Client",
    "Closed",
    "ConnectRefused",
    "ConnectTimeout",
    "DeviceError",
    "LocalProtocolError",
    "MessageTooLarge",
    "OutOfResources",
    "PeerDied",
    "PeerProtocolError",
    "PendingReply",
    "ProtocolError",
    "RemoteError",
    "ReplyStream",
    "SegmentError",
    "Server",
    "Statistics",
    "TensorTooLarge",
    "TransportError",
    "__version__",
    "as_completed",
    "wait",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
