"""Tensors between two processes of one machine, through shared memory and without copies.

``Server`` registers functions, ``Client`` calls them; see the README for an example.
"""

from .aio import AsyncClient
from .aio_server import AsyncServer
from .client import Client
from .errors import (
    AddressError,
    ArenaFull,
    CallTimeout,
    Closed,
    ConnectRefused,
    ConnectTimeout,
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
from .message import CHANNEL_KINDS, ChannelKind
from .protocol import PendingReply
from .server import Server
from .statistics import Statistics
from .version import VERSION

__version__ = VERSION

__all__ = [
    "CHANNEL_KINDS",
    "AddressError",
    "ArenaFull",
    "AsyncClient",
    "AsyncServer",
    "CallTimeout",
    "ChannelKind",
    "Client",
    "Closed",
    "ConnectRefused",
    "ConnectTimeout",
    "LocalProtocolError",
    "MessageTooLarge",
    "OutOfResources",
    "PeerDied",
    "PeerProtocolError",
    "PendingReply",
    "ProtocolError",
    "RemoteError",
    "SegmentError",
    "Server",
    "Statistics",
    "TensorTooLarge",
    "TransportError",
    "__version__",
]
