"""How a connection comes about, without sockets: which bytes to send, and what the answers mean.

Each side allocates only after the other has committed to as much::

    client                                   server
      Hello(sizes, channel)        ──►         within the limits?
                                   ◄──       Offer, or Refused(figures)
      creates its segment
      Attach(name, bell)           ──►         maps it, learns the client's process from the kernel,
                                               unlinks it, creates its own segment
      maps it, unlinks it          ◄──       Welcome(name, bell)

A peer could have named what is another's. So a side unlinks the peer's segment only where the kernel shows that the
process at the other end of the socket owns it. Elsewhere (TCP, other pid namespaces) the owner does so: the client when
it is welcome, the server with the first message that comes. A bell is unlinked by its owner.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from . import open_files
from .bell import Bell, bell_file, is_bell_name
from .bell import remove_if_dead as remove_bell_if_dead
from .connection import Bells, Connection, segment_layout
from .errors import ConnectRefused, OutOfResources, PeerProtocolError, SegmentError
from .layout import Layout
from .message import (
    CHANNEL_KINDS,
    MIN_MESSAGE_BYTES,
    Attach,
    ChannelKind,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refused,
    Welcome,
    decode,
    encode,
    shorten,
)
from .opening import opening_error
from .segment import Segment, is_segment_name
from .segment import remove_if_dead as remove_segment_if_dead
from .statistics import Counters
from .text import printable
from .units import size_text

_ONE_CLIENT = 8
"""File descriptors that a server needs for one more client: two for each segment, a pidfd, a bell, and spares."""

Expected = TypeVar("Expected", bound=Message)


class Sizes(NamedTuple):
    """Data bytes of the two arenas of one connection, seen from the client."""

    request_arena_bytes: int
    reply_arena_bytes: int


@dataclass(frozen=True)
class Wishes:
    """What a client wants of its connection; see ``Client``. Sizes in bytes."""

    sizes: Sizes
    max_message_bytes: int
    channel: ChannelKind = "zmq"
    snapshot: bool = False
    claim_timeout_s: float = 0.0


def client_handshake(wishes: Wishes, counters: Counters) -> Generator[bytes, bytes, Connection]:
    """The client's half: yields bytes to send, is sent the server's answer to them, returns the connection.

    Raises:
        ConnectRefused: the server said no.
        PeerProtocolError: it answered something invalid.
        SegmentError: no shared memory.
    """
    sizes = wishes.sizes
    by_doorbell = wishes.channel == "doorbell"
    offer = _expect(Offer, (yield encode(Hello(*sizes, wishes.max_message_bytes, wishes.channel))))
    if not MIN_MESSAGE_BYTES <= offer.max_message_bytes <= wishes.max_message_bytes:
        raise PeerProtocolError(
            f"the server offered messages of {offer.max_message_bytes} bytes; {wishes.max_message_bytes} were asked for"
        )
    ring_message_bytes = offer.max_message_bytes if by_doorbell else 0
    with ExitStack() as undo:
        own = Segment.create(segment_layout(sizes.request_arena_bytes, ring_message_bytes))
        undo.callback(own.close)
        own_bell = undo.enter_context(Bell.create()) if by_doorbell else None
        attach = Attach(own.name, "" if own_bell is None else own_bell.name)
        _of_clients.add(own.name)
        try:
            welcome = _expect(Welcome, (yield encode(attach)))
            layout = segment_layout(sizes.reply_arena_bytes, ring_message_bytes)
            undo.callback(_remove_if_dead, welcome)
            peer = _attach_peers(welcome.segment, layout, _of_clients)
        finally:
            _of_clients.discard(own.name)
        undo.callback(peer.close)
        bells = None if own_bell is None else Bells(own_bell, undo.enter_context(_open_peers(welcome.bell, own_bell)))
        own.unlink()
        if own_bell is not None:
            own_bell.unlink()
        connection = Connection(
            own,
            peer,
            counters,
            offer.max_message_bytes,
            bells=bells,
            snapshot=wishes.snapshot,
            claim_timeout_s=wishes.claim_timeout_s,
        )
        undo.pop_all()
        return connection


def _remove_if_dead(welcome: Welcome) -> None:
    """Remove the names that a server has left that was killed after its Welcome."""
    if is_segment_name(welcome.segment):
        remove_segment_if_dead(welcome.segment)
    if is_bell_name(welcome.bell):
        remove_bell_if_dead(bell_file(welcome.bell))


_of_clients: set[str] = set()
_of_servers: set[str] = set()
"""Names of segments that this process's clients and servers have made, while a peer could still find them by name."""


def _attach_peers(name: str, layout: Layout, of_own_kind: set[str]) -> Segment:
    """Map the peer's segment.

    What a server has made is no client's, nor the other way round: a peer that names such a segment could not be
    watched, since its owner is this process, which lives.
    """
    if name in of_own_kind:
        raise PeerProtocolError("the peer gave the name of a segment that is not its own")
    return Segment.attach(name, layout)


def _open_peers(name: str, own: Bell) -> Bell:
    """Open the peer's bell: never this side's own, and nothing that a semaphore can't be in."""
    if name == own.name:
        raise PeerProtocolError("the peer gave the name of a bell that is not its own")
    try:
        if is_bell_name(name) and not os.stat(bell_file(name)).st_size:  # looking into it would end this process
            raise PeerProtocolError("the peer's bell is an empty file")
        return Bell.open(name)
    except (OSError, ValueError) as error:  # nothing is there, or a directory
        raise opening_error("bell", error) from error


_UNKNOWN = "this server does not know the connection; it may have been restarted"


class ServerReplaced(Exception):
    """Another server has taken the place of the one that the handshake was begun with."""


def _expect(kind: type[Expected], data: bytes) -> Expected:
    message = decode(data)
    if isinstance(message, Refused):
        raise ConnectRefused(f"the server refused: {printable(message.reason)}")
    if isinstance(message, Goodbye):
        if message.reason == _UNKNOWN:
            raise ServerReplaced
        raise ConnectRefused(f"the server ended the handshake: {printable(message.reason)}")
    if not isinstance(message, kind):
        raise PeerProtocolError(f"the server sent a {type(message).__name__} where {kind.__name__} is due")
    return message


@dataclass(frozen=True)
class Limits:
    """What a server grants.

    ``channels`` are those that clients may use, ``max_arena_bytes`` bounds both arenas of one client together.
    """

    max_arena_bytes: int
    max_total_arena_bytes: int
    max_clients: int
    max_message_bytes: int
    channels: tuple[ChannelKind, ...] = CHANNEL_KINDS
    total_source: str = "set by its owner"
    handshake_timeout_s: float = 10.0
    claim_timeout_s: float = 0.0


class Admitted(NamedTuple):
    """A client whose segments are mapped on this side."""

    sizes: Sizes
    connection: Connection


class _Newcomer(NamedTuple):
    sizes: Sizes
    max_message_bytes: int
    channel: ChannelKind
    since: float


class _Granted(NamedTuple):
    sizes: Sizes
    segment: str
    clients_segment: str


class Admission:
    """The server's half, for all clients that are not connected yet.

    ``own_bell`` gives the bell that the server waits for, and is asked only when a client wants to ring it.
    """

    def __init__(self, limits: Limits, counters: Counters, own_bell: Callable[[], Bell]) -> None:
        self._limits = limits
        self._own_bell = own_bell
        self._counters = counters
        self._newcomers: dict[bytes, _Newcomer] = {}
        self._admitted: dict[bytes, _Granted] = {}

    def receive(self, identity: bytes, data: bytes, pid: int | None = None) -> tuple[Message | None, Admitted | None]:
        """Take one message of a client that is not connected: the answer, and the connection if it now stands.

        ``pid`` is the process that sent it, from the kernel; None if that is not known.

        Raises:
            PeerProtocolError: the message is invalid; the client is forgotten.
        """
        self._forget_unfinished()
        newcomer = self._newcomers.pop(identity, None)
        message = decode(data)
        if isinstance(message, Goodbye):
            return None, None
        if newcomer is not None:
            if not isinstance(message, Attach):
                raise PeerProtocolError(f"the client sent a {type(message).__name__} where Attach is due")
            return self._attach(identity, newcomer, message, pid)
        if not isinstance(message, Hello):
            return Goodbye(_UNKNOWN), None
        sizes = Sizes(message.request_arena_bytes, message.reply_arena_bytes)
        refusal = self._refusal(sizes, message.max_message_bytes, message.channel)
        if refusal is not None:
            return Refused(refusal), None
        max_message_bytes = min(message.max_message_bytes, self._limits.max_message_bytes)
        self._newcomers[identity] = _Newcomer(sizes, max_message_bytes, message.channel, time.monotonic())
        return Offer(max_message_bytes), None

    def expects(self, identity: bytes) -> bool:
        """Whether this client has begun the handshake and not ended it."""
        return identity in self._newcomers

    def forget(self, identity: bytes) -> None:
        """A client has gone, admitted or not: what it took counts no more."""
        self._newcomers.pop(identity, None)
        granted = self._admitted.pop(identity, None)
        if granted is not None:
            _of_servers.discard(granted.segment)

    def _refusal(self, sizes: Sizes, max_message_bytes: int, channel: ChannelKind) -> str | None:
        """Why these sizes and this channel are not granted, or None."""
        if max_message_bytes < MIN_MESSAGE_BYTES:
            return f"max_message_bytes is {max_message_bytes}; it must be {MIN_MESSAGE_BYTES} or more"
        try:
            promised = _ONE_CLIENT * len(self._newcomers)
            open_files.require(_ONE_CLIENT, "one more client", kept=open_files.reserve() + promised)
        except OutOfResources as error:
            return str(error)
        limits = self._limits
        if channel not in limits.channels:
            offered = " and ".join(limits.channels)
            return f"the channel {channel} was asked for; its channels are {offered}: use {limits.channels[0]}"
        granted = [one.sizes for one in self._admitted.values()]
        granted += [newcomer.sizes for newcomer in self._newcomers.values()]
        asked = sum(sizes)
        taken = sum(map(sum, granted))
        if len(granted) >= limits.max_clients:
            return (
                f"it serves {len(granted)} clients already; its max_clients is {limits.max_clients}: "
                "end one of them, or raise it"
            )
        if asked > limits.max_arena_bytes:
            return (
                f"{size_text(asked)} of arenas were asked for (requests and replies together); "
                f"its max_arena_bytes is {size_text(limits.max_arena_bytes)}: ask for less, or raise it"
            )
        if asked + taken > limits.max_total_arena_bytes:
            return (
                f"{size_text(asked)} of arenas were asked for; its {len(granted)} clients hold "
                f"{size_text(taken)} of the {size_text(limits.max_total_arena_bytes)} of max_total_arena_bytes "
                f"({limits.total_source}): ask for a smaller arena_bytes, raise it, or enlarge /dev/shm"
            )
        return None

    def _attach(
        self, identity: bytes, newcomer: _Newcomer, attach: Attach, pid: int | None
    ) -> tuple[Message, Admitted | None]:
        if any(attach.segment == one.clients_segment for one in self._admitted.values()):
            raise PeerProtocolError("the peer gave the name of a segment that is another client's")
        sizes = newcomer.sizes
        by_doorbell = newcomer.channel == "doorbell"
        ring_message_bytes = newcomer.max_message_bytes if by_doorbell else 0
        with ExitStack() as undo:
            try:
                layout = segment_layout(sizes.request_arena_bytes, ring_message_bytes)
                peer = _attach_peers(attach.segment, layout, _of_servers)
                undo.callback(peer.close)
                bells = None
                if by_doorbell:
                    own_bell = self._own_bell()
                    bells = Bells(own_bell, undo.enter_context(_open_peers(attach.bell, own_bell)))
                own = Segment.create(segment_layout(sizes.reply_arena_bytes, ring_message_bytes))
                undo.callback(own.close)
            except (SegmentError, OutOfResources) as error:
                return Refused(shorten(str(error))), None
            try:
                connection = Connection(
                    own,
                    peer,
                    self._counters,
                    newcomer.max_message_bytes,
                    bells=bells,
                    claim_timeout_s=self._limits.claim_timeout_s,
                )
                undo.callback(connection.close)
                connection.check_owner(pid)
            except OSError as error:
                return Refused(f"its process can't be watched: {error.strerror}"), None
            undo.pop_all()
        self._admitted[identity] = _Granted(sizes, own.name, attach.segment)
        _of_servers.add(own.name)
        return Welcome(own.name, "" if bells is None else bells.own.name), Admitted(sizes, connection)

    def _forget_unfinished(self) -> None:
        """Forget clients that said Hello and then nothing."""
        limit = time.monotonic() - self._limits.handshake_timeout_s
        for identity in [identity for identity, newcomer in self._newcomers.items() if newcomer.since < limit]:
            del self._newcomers[identity]
