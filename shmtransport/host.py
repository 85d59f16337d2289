"""What the blocking and the asyncio server share: handlers, clients, and what a received message leads to."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from . import address as addresses
from . import leftovers, options
from .channel import BrokenPeer
from .doorbell import DoorbellServerChannel
from .errors import Closed, LocalProtocolError, OutOfResources, PeerProtocolError, TransportError
from .forks import BoundToProcess, abandon_after_fork, forked
from .handshake import Admission, Admitted, Limits
from .hosted import Arrival, HostedClient, drop_all, remove_names_at_exit
from .message import (
    CHANNEL_KINDS,
    DEFAULT_MAX_MESSAGE_BYTES,
    ChannelKind,
    Goodbye,
    Message,
    Refused,
    encode,
    shorten,
)
from .opening import reason
from .protocol import Call
from .segment import shared_memory_bytes
from .statistics import Counters, Statistics
from .text import forget_frames, printable, traceback_text
from .uncompiled import uncompiled
from .units import size_text
from .zmq_channel import ZmqServerChannel

logger = logging.getLogger("shmtransport")

_MOST_TO_REFUSE = 64

Handler = TypeVar("Handler", bound=Callable[..., Any])


ECHO, PROBE = "__echo__", "__probe__"
"""Methods that every server has: the first returns its tensor, copied into the reply arena (or nothing for nothing),
the second as many bytes of the reply arena as asked for, uninitialised and not copied."""


@uncompiled
class Host(BoundToProcess):
    """Base of the two servers; see ``Server`` for the options."""

    def __init__(
        self,
        address: str,
        *,
        max_arena_bytes: int = 8 << 30,
        max_total_arena_bytes: int | None = None,
        max_clients: int = 64,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        channels: Sequence[ChannelKind] = CHANNEL_KINDS,
        spin_us: float = 0.0,
        claim_timeout_s: float = 0.0,
        drain_timeout_s: float | None = 5.0,
        prefault: bool = False,
    ) -> None:
        self.address = address
        self.transport = addresses.kind(address)
        total_source = "set by its owner"
        if max_total_arena_bytes is None:
            max_total_arena_bytes, total_source = shared_memory_bytes() // 2, "half of /dev/shm"
        limits = Limits(
            options.whole("max_arena_bytes", max_arena_bytes),
            options.whole("max_total_arena_bytes", max_total_arena_bytes),
            options.whole("max_clients", max_clients),
            options.message_bytes(max_message_bytes),
            options.channel_kinds(channels),
            total_source,
            claim_timeout_s=options.seconds("claim_timeout_s", claim_timeout_s),
        )
        spin_us = options.seconds("spin_us", spin_us)
        self._drain_timeout_s = options.seconds_or_no_limit("drain_timeout_s", drain_timeout_s)
        self._prefault = options.flag("prefault", prefault)
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._on_disconnect: list[Callable[[int], None]] = []
        self._counters = Counters()
        self._clients: dict[bytes, HostedClient] = {}
        self._watched: dict[int, HostedClient] = {}
        self._unwatched: set[HostedClient] = set()
        self._connected = 0
        self._last_refused = b""
        self._to_refuse: deque[tuple[bytes, bytes, int | None]] = deque()
        # A reference that keeps nothing: a task that a handler starts has a copy of it for as long as it runs.
        self._current: ContextVar[weakref.ref[HostedClient]] = ContextVar("current client")
        self._stopping = threading.Event()
        self._served = threading.Event()
        self._ended: Closed | None = None
        self._channel = DoorbellServerChannel(ZmqServerChannel(address, limits.max_message_bytes), spin_us)
        self._admission = Admission(limits, self._counters, self._channel.bell)
        self._at_drop = weakref.finalize(self, drop_all, self._channel, self._clients, address)
        self._at_drop.atexit = False  # other threads may still serve; names are removed, and the kernel does the rest
        remove_names_at_exit(self._channel)
        abandon_after_fork(self)
        leftovers.sweep()

    def method(self, handler: Handler) -> Handler:
        """Decorator: register a function under its own name."""
        self.register(handler.__name__, handler)
        return handler

    def register(self, name: str, handler: Callable[..., Any]) -> None:
        """Let clients call ``handler`` as ``name``. Tensors reach it as borrowed views of the client's arena.

        Raises:
            LocalProtocolError: the name is taken, or starts with "__" as those do that every server answers.
        """
        if name.startswith("__"):
            raise LocalProtocolError(f"{name!r} can't be registered: names that start with '__' are the server's own")
        if name in self._handlers:
            raise LocalProtocolError(f"a handler for {name!r} is already registered")
        self._handlers[name] = handler

    def on_disconnect(self, callback: Callable[[int], None]) -> None:
        """Call ``callback(connection_id)`` whenever a client has gone, however it went."""
        self._on_disconnect.append(callback)

    @property
    def connection_id(self) -> int:
        """In a handler: the number of the connection that it serves; never used again for another.

        Raises:
            LocalProtocolError: outside of a handler.
            Closed: in a forked child.
        """
        return self._caller().number

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """In a handler: an uninitialised tensor in the caller's reply arena; returned, it is not copied.

        Raises:
            ArenaFull, TensorTooLarge: no room now, or never. The client gets the same error.
            LocalProtocolError: outside of a handler.
            Closed: in a forked child.
        """
        return self._caller().connection.send_arena.empty(shape, dtype)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """As ``empty``, with the shape and dtype of another tensor."""
        return self.empty(tensor.shape, tensor.dtype)

    def statistics(self) -> Statistics:
        """Totals over all clients since this server was made."""
        self._counters.waits = self._channel.waits
        return self._counters.snapshot()

    def stop(self) -> None:
        """Make ``serve`` return; may be called from any thread, a handler or a signal handler."""
        self._stopping.set()
        self._channel.wake()

    def abandon(self) -> None:
        """In a forked child: this server is the parent's, and nothing that is done here may reach it."""
        self._at_drop.detach()
        self._ended = forked("the server")
        self._channel.abandon()
        for client in self._clients.values():
            client.gone = True
            client.connection.abandon()
        self._clients.clear()
        self._watched.clear()
        self._unwatched.clear()
        self._stopping.set()

    def _drop_all(self) -> None:
        """End all connections."""
        for client in list(self._clients.values()):
            self._send(client.identity, Goodbye("the server was shut down"))
            self._drop(client, "server shut down")

    def _check_usable(self) -> None:
        """Check that this server is this process's own, and not closed.

        Raises:
            Closed: it is not.
        """
        if self._ended is not None:
            raise Closed(*self._ended.args)

    def _caller(self) -> HostedClient:
        self._check_usable()
        reference = self._current.get(None)
        client = None if reference is None else reference()
        if client is None:
            raise LocalProtocolError("this is known only inside a handler")
        return client

    def _receive(self) -> Arrival | bool:
        """Take the next message: a call that it asks for; else whether there was one at all."""
        try:
            received = self._channel.receive()
        except BrokenPeer as broken:
            self._refuse(self._clients[broken.peer], broken.error)
            return True
        if received is None:
            if self._to_refuse:
                self._admit(*self._to_refuse.popleft(), again=True)
                return True
            return False
        identity, data = received
        client = self._clients.get(identity)
        if client is None:
            self._admit(identity, data, self._channel.sender_pid)
            return True
        if not client.heard:  # it has mapped this side's segment
            client.heard = True
            client.connection.unlink_own()
        try:
            call = client.protocol.receive(data)
        except PeerProtocolError as error:
            self._refuse(client, error)
            return True
        if call is None:
            self._drop(client, "it said goodbye")
            return True
        return Arrival(client, call)

    def _reply(self, client: HostedClient, data: bytes) -> None:
        """Send a call's reply."""
        try:
            if not client.gone and not self._channel.send(client.identity, data):
                self._drop(client, "it no longer reads its replies")
        except BrokenPeer as broken:
            self._refuse(client, broken.error)

    def _handler(self, call: Call) -> Callable[..., Any]:
        handler = self._handlers.get(call.method) or self._built_in(call.method)
        if handler is None:
            raise LocalProtocolError(
                f"there is no method '{printable(call.method)}'; "
                f"there are: {', '.join(sorted(self._handlers)) or 'none'}"
            )
        return handler

    def _built_in(self, name: str) -> Callable[..., Any] | None:
        """What every server answers, so that its channels can be measured."""
        built_in: dict[str, Callable[..., Any]] = {ECHO: _echo, PROBE: self._probe}
        return built_in.get(name)

    def _probe(self, nbytes: int, _tensor: torch.Tensor | None = None) -> torch.Tensor:
        """So many bytes of the caller's reply arena, as they are; nobody looks at the tensor that came."""
        if type(nbytes) is not int or nbytes < 0:
            raise LocalProtocolError(f"{PROBE} takes a number of bytes, and a tensor if you like")
        return self.empty((nbytes,), torch.uint8)

    def _failure(self, client: HostedClient, call: Call, error: BaseException) -> bytes:
        """The bytes that tell a caller of its call's exception."""
        self._counters.failures += 1
        if not isinstance(error, TransportError):
            logger.error("handler %s raised\n%s", printable(call.method), traceback_text(error))
        data = client.protocol.failure(call.call_id, error)
        forget_frames(error)  # whoever else has logged it may keep it
        error.__traceback__ = None  # one that is raised again and again would grow
        return data

    def _drop_ended(self, readable: Sequence[int]) -> None:
        """Drop the clients whose processes have ended, by the descriptors that told so."""
        for descriptor in readable:
            client = self._watched.get(descriptor)
            # Asked once more: the number may meanwhile be that of another client's descriptor.
            if client is not None and not client.connection.watch.alive():
                self._drop(client, "its process ended")

    def _ask_unwatched(self) -> None:
        """Drop those clients that have ended of which no descriptor would tell."""
        for client in [client for client in self._unwatched if not client.connection.watch.alive()]:
            self._drop(client, "its process ended")

    def _refuse(self, client: HostedClient, error: PeerProtocolError) -> None:
        """A malformed message costs its sender the connection, nothing else."""
        logger.warning("client %d broke the protocol: %s", client.number, error)
        self._send(client.identity, Goodbye(shorten(f"protocol error: {error}")))
        self._drop(client, "protocol error")

    def _admit(self, identity: bytes, data: bytes, pid: int | None, *, again: bool = False) -> None:
        """Take a message of a client that is not connected, sent by process ``pid`` if that is known.

        One whose wishes can't be granted is looked at ``again`` when all else that has come was received: another
        client's goodbye may be among it.
        """
        begins = not self._admission.expects(identity)
        client = None
        try:
            answer, admitted = self._admission.receive(identity, data, pid)
            if admitted is not None:
                client = self._prepare(identity, admitted)
        except (PeerProtocolError, OutOfResources) as error:
            answer = Refused(shorten(str(error)))
        else:
            if isinstance(answer, Refused) and begins and not again and len(self._to_refuse) < _MOST_TO_REFUSE:
                self._to_refuse.append((identity, data, pid))
                return
        if client is None:
            self._channel.drop_unused_bell()
        if isinstance(answer, Refused) and identity != self._last_refused:
            self._last_refused = identity  # one that goes on sending is not logged again
            logger.warning("a client was refused: %s", answer.reason)
        # The answer goes by ZeroMQ, so before the client's channel may be another one.
        answered = answer is None or self._send(identity, answer)
        if client is not None:
            self._connect(client)
            if not answered:
                self._drop(client, "it went away while connecting")
        elif not answered:
            self._admission.forget(identity)

    def _prepare(self, identity: bytes, admitted: Admitted) -> HostedClient:
        """Do all that may fail, before a client is told that it is connected.

        Raises:
            OutOfResources: it can't be served; nothing of it is kept.
        """
        client = HostedClient(identity, self._connected + 1, admitted, self._counters)
        watch = client.connection.watch
        descriptor = watch.fileno()
        try:
            if descriptor is not None:
                self._channel.watch(descriptor)
                self._watched[descriptor] = client
            elif watch.must_be_asked:
                self._unwatched.add(client)
            if self._prefault:
                client.connection.prefault()
        except (OSError, MemoryError) as error:
            self._free(client)
            raise OutOfResources(f"it can't serve one more client: {reason(error)}") from error
        return client

    def _connect(self, client: HostedClient) -> None:
        """From now on this client's messages are calls."""
        connection = client.connection
        self._connected += 1
        self._clients[client.identity] = client
        self._channel.know(client.identity)
        if connection.ring is not None and connection.bells is not None:
            self._channel.connect(client.identity, connection.ring, connection.bells.peer)
        logger.info(
            "client %d connected at %s (%s, %s channel): request arena %s, reply arena %s, process %d",
            client.number,
            self.address,
            self.transport,
            self._channel.kind_of(client.identity),
            size_text(client.sizes.request_arena_bytes),
            size_text(client.sizes.reply_arena_bytes),
            connection.watch.pid,
        )

    def _drop(self, client: HostedClient, why: str) -> None:
        """End a client's connection, and tell those who asked to know."""
        del self._clients[client.identity]
        self._channel.disconnect(client.identity)
        self._free(client)
        logger.info("client %d disconnected: %s", client.number, why)
        for callback in self._on_disconnect:
            try:
                callback(client.number)
            except (SystemExit, KeyboardInterrupt):  # noqa: PERF203
                raise
            except BaseException as error:  # noqa: BLE001 - one service's mistake must not end the others' clients
                logger.error("an on_disconnect callback raised\n%s", traceback_text(error))

    def _free(self, client: HostedClient) -> None:
        """Give all back that is held for a client."""
        client.gone = True
        descriptor = client.connection.watch.fileno()
        if descriptor is not None and self._watched.pop(descriptor, None) is not None:
            self._channel.unwatch(descriptor)
        self._unwatched.discard(client)
        self._admission.forget(client.identity)
        client.connection.close()

    def _send(self, identity: bytes, message: Message) -> bool:
        """Send a message that is no reply; False if the client is gone."""
        try:
            return self._channel.send(identity, encode(message))
        except BrokenPeer:
            return False


def _echo(tensor: torch.Tensor | None = None) -> torch.Tensor | None:
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise LocalProtocolError(f"{ECHO} takes one tensor, or nothing")
    return tensor
