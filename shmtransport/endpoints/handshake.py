"""Sets up a connection, without sockets: which bytes to send, and what the answers mean.

Each side allocates only after the other has committed to as much::

    client                                   server
      Hello(sizes, channel)        ──►         checks its limits
                                   ◄──       Offer, or Refused(figures)
      creates its segment
      Attach(name)                 ──►         maps it, creates its own segment,
                                               learns the client's process from the kernel,
                                               unlinks the client's segment
      maps it, unlinks it          ◄──       Welcome(name)

A peer could name a segment that is not its own. So each side unlinks the peer's segment only if the kernel shows that
the process at the other end of the socket owns it. Otherwise (TCP, other pid namespaces) the owner unlinks it: the
client when it is welcomed, the server when the first message arrives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

from ..channels import open_files
from ..core import Counters
from ..core.layout import Layout
from ..cuda.copies import NewCopies
from ..errors import ConnectRefused, DeviceError, OutOfResources, PeerProtocolError, SegmentError
from ..memory.ownership import Role, registry
from ..memory.segment import SEGMENTS, Segment
from ..protocol.messages import (
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
from ..text import printable
from ..units import size_text
from .connection_memory import ConnectionMemory, segment_layout
from .options import ClientOptions, ServerOptions

_ONE_CLIENT = 8
"""File descriptors that a server needs for one more client: two for each segment, a pidfd, three spare."""

Expected = TypeVar("Expected", bound=Message)


class Sizes(NamedTuple):
    """Sizes of one connection's arenas in bytes, named from the client's side."""

    request_arena_bytes: int
    reply_arena_bytes: int


def client_handshake(
    options: ClientOptions,
    claim_timeout_s: float,
    counters: Counters,
    new_copies: NewCopies | None = None,
) -> Generator[bytes, bytes, ConnectionMemory]:
    """Run the client's half: yield bytes to send, take the answers, return the memory.

    Args:
        options: what the client asks for.
        claim_timeout_s: how long a claim in the request arena may block, in seconds.
        counters: where the connection counts.
        new_copies: makes what copies between the arenas and a GPU. Default: there is no GPU.

    Raises:
        ConnectRefused: the server refused.
        PeerProtocolError: it answered something invalid.
        SegmentError: no shared memory.
    """
    sizes = Sizes(options.arena_bytes, options.reply_arena_bytes)
    by_doorbell = options.channel == "doorbell"
    offer = _expect(Offer, (yield encode(Hello(*sizes, options.max_message_bytes, options.channel))))
    if not MIN_MESSAGE_BYTES <= offer.max_message_bytes <= options.max_message_bytes:
        raise PeerProtocolError(
            f"the server offered messages of {offer.max_message_bytes} bytes; "
            f"{options.max_message_bytes} were asked for"
        )
    ring_message_bytes = offer.max_message_bytes if by_doorbell else 0
    with ExitStack() as undo:
        own = Segment.create(segment_layout(sizes.request_arena_bytes, ring_message_bytes), "client")
        undo.callback(own.close)
        welcome = _expect(Welcome, (yield encode(Attach(own.name))))
        layout = segment_layout(sizes.reply_arena_bytes, ring_message_bytes)
        undo.callback(SEGMENTS.remove_if_dead, welcome.segment)
        peer = _attach_peers(welcome.segment, layout, "client")
        undo.callback(peer.close)
        own.unlink()
        memory = ConnectionMemory(
            own,
            peer,
            counters,
            offer.max_message_bytes,
            by_doorbell=by_doorbell,
            snapshot=options.snapshot,
            claim_timeout_s=claim_timeout_s,
            new_copies=new_copies,
        )
        undo.pop_all()
        return memory


def _attach_peers(name: str, layout: Layout, own_role: Role) -> Segment:
    """Map the peer's segment.

    That set names segments that this process made on this side of a connection, which can't be a peer's. Their owner is
    this process, so watching it would never show the peer's end.
    """
    if registry.role_of(name) == own_role:
        raise PeerProtocolError("the peer gave the name of a segment that is not its own")
    return Segment.attach(name, layout)


_UNKNOWN = "this server does not know the connection; it may have been restarted"


class ServerReplaced(Exception):
    """Another server has replaced the one that the handshake began with."""


def _expect(kind: type[Expected], data: bytes) -> Expected:
    message = decode(data)
    if isinstance(message, Refused):
        raise ConnectRefused(f"the server refused: {printable(message.reason)}")
    if isinstance(message, Goodbye):
        if message.reason == _UNKNOWN:
            raise ServerReplaced
        raise ConnectRefused(f"the server ended the handshake: {printable(message.reason)}")
    if not isinstance(message, kind):
        raise PeerProtocolError(f"the server sent a {type(message).__name__} where {kind.__name__} was expected")
    return message


class Admitted(NamedTuple):
    """A client whose segments are mapped on this side."""

    sizes: Sizes
    memory: ConnectionMemory


class _Newcomer(NamedTuple):
    sizes: Sizes
    max_message_bytes: int
    channel: ChannelKind
    since: float


class _Granted(NamedTuple):
    sizes: Sizes
    clients_segment: str


class Admission:
    """The server's half, for all clients that are not connected yet.

    Args:
        options: the server's limits.
        counters: where connections count.
        prepare_doorbell: called before a client of the doorbell channel is admitted.
        new_copies: makes what copies between a connection's arenas and a GPU. Default: there is no GPU.
    """

    def __init__(
        self,
        options: ServerOptions,
        counters: Counters,
        prepare_doorbell: Callable[[], None],
        new_copies: NewCopies | None = None,
    ) -> None:
        self._options = options
        self._prepare_doorbell = prepare_doorbell
        self._new_copies = new_copies
        self._counters = counters
        self._newcomers: dict[bytes, _Newcomer] = {}
        self._admitted: dict[bytes, _Granted] = {}

    def answer(self, client_key: bytes, data: bytes, pid: int | None = None) -> tuple[Message | None, Admitted | None]:
        """Take one message of a client that is not connected.

        Args:
            client_key: ZeroMQ's key of the client.
            data: the message.
            pid: the process that sent it, as the kernel reports it (default None: unknown).

        Returns:
            The answer, if there is one, and the client, if it is admitted now.

        Raises:
            PeerProtocolError: the message is invalid; the client is forgotten.
        """
        self._forget_unfinished()
        newcomer = self._newcomers.pop(client_key, None)
        message = decode(data)
        if isinstance(message, Goodbye):
            return None, None
        if newcomer is not None:
            if not isinstance(message, Attach):
                raise PeerProtocolError(f"the client sent a {type(message).__name__} where Attach was expected")
            return self._attach(client_key, newcomer, message, pid)
        if not isinstance(message, Hello):
            return Goodbye(_UNKNOWN), None
        sizes = Sizes(message.request_arena_bytes, message.reply_arena_bytes)
        refusal = self._refusal(sizes, message.max_message_bytes, message.channel)
        if refusal is not None:
            return Refused(refusal), None
        max_message_bytes = min(message.max_message_bytes, self._options.max_message_bytes)
        self._newcomers[client_key] = _Newcomer(sizes, max_message_bytes, message.channel, time.monotonic())
        return Offer(max_message_bytes), None

    def expects(self, client_key: bytes) -> bool:
        """Whether this client has begun the handshake but not finished it."""
        return client_key in self._newcomers

    def forget(self, client_key: bytes) -> None:
        """Stop counting a departed client, admitted or not, against the limits."""
        self._newcomers.pop(client_key, None)
        self._admitted.pop(client_key, None)

    def _refusal(self, sizes: Sizes, max_message_bytes: int, channel: ChannelKind) -> str | None:
        """Return why these sizes and this channel can't be granted, or None if they can."""
        if max_message_bytes < MIN_MESSAGE_BYTES:
            return f"max_message_bytes is {max_message_bytes}; it must be {MIN_MESSAGE_BYTES} or more"
        try:
            promised = _ONE_CLIENT * len(self._newcomers)
            open_files.require(_ONE_CLIENT, "one more client", kept=open_files.reserve() + promised)
        except OutOfResources as error:
            return str(error)
        options = self._options
        if channel not in options.channels:
            offered = " and ".join(options.channels)
            return f"the channel {channel} was asked for; its channels are {offered}: use {options.channels[0]}"
        granted = [one.sizes for one in self._admitted.values()]
        granted += [newcomer.sizes for newcomer in self._newcomers.values()]
        asked = sum(sizes)
        taken = sum(map(sum, granted))
        if len(granted) >= options.max_clients:
            return (
                f"it serves {len(granted)} clients already; its max_clients is {options.max_clients}: "
                "end one of them, or raise it"
            )
        if asked > options.max_arena_bytes:
            return (
                f"{size_text(asked)} of arenas were asked for (requests and replies together); "
                f"its max_arena_bytes is {size_text(options.max_arena_bytes)}: ask for less, or raise it"
            )
        if asked + taken > options.max_total_arena_bytes:
            return (
                f"{size_text(asked)} of arenas were asked for; its {len(granted)} clients hold "
                f"{size_text(taken)} of the {size_text(options.max_total_arena_bytes)} of max_total_arena_bytes "
                f"({options.total_source}): ask for a smaller arena_bytes, raise it, or enlarge /dev/shm"
            )
        return None

    def _attach(
        self, client_key: bytes, newcomer: _Newcomer, attach: Attach, pid: int | None
    ) -> tuple[Message, Admitted | None]:
        if any(attach.segment == one.clients_segment for one in self._admitted.values()):
            raise PeerProtocolError("the peer gave the name of a segment that is another client's")
        sizes = newcomer.sizes
        by_doorbell = newcomer.channel == "doorbell"
        ring_message_bytes = newcomer.max_message_bytes if by_doorbell else 0
        with ExitStack() as undo:
            try:
                layout = segment_layout(sizes.request_arena_bytes, ring_message_bytes)
                peer = _attach_peers(attach.segment, layout, "server")
                undo.callback(peer.close)
                if by_doorbell:
                    self._prepare_doorbell()
                own = Segment.create(segment_layout(sizes.reply_arena_bytes, ring_message_bytes), "server")
                undo.callback(own.close)
            except (SegmentError, OutOfResources) as error:
                return Refused(shorten(str(error))), None
            try:
                memory = ConnectionMemory(
                    own,
                    peer,
                    self._counters,
                    newcomer.max_message_bytes,
                    by_doorbell=by_doorbell,
                    claim_timeout_s=self._options.claim_timeout_s,
                    new_copies=self._new_copies,
                )
                undo.callback(memory.close)
                memory.check_owner(pid)
            except OSError as error:
                return Refused(f"the client's process can't be watched: {error.strerror}"), None
            except DeviceError as error:
                return Refused(shorten(str(error))), None
            undo.pop_all()
        self._admitted[client_key] = _Granted(sizes, attach.segment)
        return Welcome(own.name), Admitted(sizes, memory)

    def _forget_unfinished(self) -> None:
        """Forget clients that sent Hello and then nothing."""
        limit = time.monotonic() - self._options.handshake_timeout_s
        for client_key in [client_key for client_key, newcomer in self._newcomers.items() if newcomer.since < limit]:
            del self._newcomers[client_key]
