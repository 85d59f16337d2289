"""The blocking server: one thread, many clients, each with its own pair of segments."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from . import address as addresses
from .channel import ServerChannel, ZmqServerChannel
from .connection import Connection, attach_peer, segment_layout
from .errors import LocalProtocolError, PeerProtocolError, SegmentError, TransportError
from .message import (
    DEFAULT_MAX_MESSAGE_BYTES,
    Attach,
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
from .protocol import Call, ServerProtocol
from .segment import MIB, Segment
from .statistics import Counters, Statistics

logger = logging.getLogger("shmtransport")

Handler = TypeVar("Handler", bound=Callable[..., Any])
_HANDSHAKE_TIMEOUT_S = 10.0


class _Peer:
    """One client, from its Hello on. ``connection`` and ``protocol`` are there once it has attached."""

    def __init__(self, identity: bytes, number: int, sizes: tuple[int, int]) -> None:
        self.identity = identity
        self.number = number
        self.sizes = sizes
        self.since = time.monotonic()
        self.connection: Connection | None = None
        self.protocol: ServerProtocol | None = None


class Server:
    """Answers calls at ``address`` with registered handlers.

    ``max_arena_bytes`` bounds both arenas of one client together, ``max_total_arena_bytes`` those of all clients
    (default: half of what /dev/shm has), ``max_clients`` their number. Sizes in bytes.

    Raises:
        AddressError: the address is malformed, not on this machine, or already served.
    """

    def __init__(
        self,
        address: str,
        *,
        max_arena_bytes: int = 8 << 30,
        max_total_arena_bytes: int | None = None,
        max_clients: int = 64,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self.address = address
        self.transport = addresses.kind(address)
        shm = os.statvfs("/dev/shm")
        self._max_arena_bytes = max_arena_bytes
        self._max_total_arena_bytes = (
            shm.f_blocks * shm.f_frsize // 2 if max_total_arena_bytes is None else max_total_arena_bytes
        )
        self._max_clients = max_clients
        self._max_message_bytes = max_message_bytes
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._on_disconnect: list[Callable[[int], None]] = []
        self._peers: dict[bytes, _Peer] = {}
        self._connected = 0
        self._counters = Counters()
        self._current: ContextVar[_Peer] = ContextVar("current client")
        self._stopping = threading.Event()
        self._channel: ServerChannel = ZmqServerChannel(address, max_message_bytes)

    def method(self, handler: Handler) -> Handler:
        """Decorator: register a function under its own name."""
        self.register(handler.__name__, handler)
        return handler

    def register(self, name: str, handler: Callable[..., Any]) -> None:
        """Let clients call ``handler`` as ``name``. Tensors reach it as borrowed views of the client's arena.

        Raises:
            LocalProtocolError: the name is taken.
        """
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
        """
        return self._caller().number

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """In a handler: an uninitialised tensor in the caller's reply arena; returned, it is not copied.

        Raises:
            ArenaFull, TensorTooLarge: no room now, or never. The client gets the same error.
            LocalProtocolError: outside of a handler.
        """
        connection = self._caller().connection
        assert connection is not None
        return connection.send_arena.empty(shape, dtype)

    def statistics(self) -> Statistics:
        """Totals over all clients since this server was made."""
        return self._counters.snapshot()

    def serve(self) -> None:
        """Answer calls until ``stop``; in the main thread SIGINT and SIGTERM stop it too, after the call in progress."""
        with self._stopped_by_signals():
            while not self._stopping.is_set():
                received = self._channel.receive()
                if received is None:
                    self._idle()
                else:
                    self._take(*received)

    def stop(self) -> None:
        """Make ``serve`` return; may be called from any thread, a handler or a signal handler."""
        self._stopping.set()
        self._channel.wake()

    def close(self) -> None:
        """End all connections and remove the socket. A second call does nothing."""
        for peer in list(self._peers.values()):
            self._send(peer.identity, Goodbye("the server was shut down"))
            self._drop(peer, "server shut down")
        self._channel.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _caller(self) -> _Peer:
        try:
            return self._current.get()
        except LookupError:
            raise LocalProtocolError("this is known only inside a handler") from None

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _idle(self) -> None:
        """Nothing to answer: block until there is, or a client's process ends."""
        watched = {
            fd: peer
            for peer in self._peers.values()
            if peer.connection is not None and (fd := peer.connection.watch.fileno()) is not None
        }
        for fd in self._channel.wait(watched):
            self._drop(watched[fd], "its process ended")

    def _take(self, identity: bytes, data: bytes) -> None:
        """Handle one message; a malformed one costs its sender the connection, nothing else."""
        peer = self._peers.get(identity)
        try:
            if peer is None or peer.protocol is None:
                self._shake_hands(identity, peer, decode(data))
                return
            call = peer.protocol.receive(data)
            if call is None:
                self._drop(peer, "it said goodbye")
            else:
                self._answer(peer, peer.protocol, call)
        except PeerProtocolError as error:
            if peer is None or peer.protocol is None:
                self._send(identity, Refused(shorten(str(error))))
            else:
                self._send(identity, Goodbye(shorten(f"protocol error: {error}")))
            logger.warning("client %s: %s; its connection is dropped", identity.hex(), error)
            if peer is not None:
                self._drop(peer, "protocol error")

    def _answer(self, peer: _Peer, protocol: ServerProtocol, call: Call) -> None:
        started = time.perf_counter()
        token = self._current.set(peer)
        try:
            data = protocol.reply(call.call_id, self._handle(call))
        except Exception as error:
            self._counters.failures += 1
            if not isinstance(error, TransportError):
                logger.exception("handler %r raised", call.method)
            data = protocol.failure(call.call_id, error)
        finally:
            self._current.reset(token)
            self._counters.calls += 1
            self._counters.call_seconds += time.perf_counter() - started
        if not self._channel.send(peer.identity, data):
            self._drop(peer, "it no longer reads its replies")

    def _handle(self, call: Call) -> Any:
        handler = self._handlers.get(call.method)
        if handler is None:
            raise LocalProtocolError(
                f"there is no method {call.method!r}; there are: {', '.join(sorted(self._handlers)) or 'none'}"
            )
        return handler(*call.arguments, **call.keywords)

    def _shake_hands(self, identity: bytes, peer: _Peer | None, message: object) -> None:
        self._drop_unfinished()
        if peer is None and isinstance(message, Hello):
            refusal = self._refusal(message)
            if refusal is not None:
                logger.warning("client %s refused: %s", identity.hex(), refusal)
                self._send(identity, Refused(refusal))
                return
            self._connected += 1
            sizes = (message.request_arena_bytes, message.reply_arena_bytes)
            self._peers[identity] = _Peer(identity, self._connected, sizes)
            self._send(identity, Offer(self._max_message_bytes))
        elif peer is not None and isinstance(message, Attach):
            self._attach(peer, message)
        elif isinstance(message, Goodbye):
            if peer is not None:
                self._drop(peer, "it said goodbye")
        elif peer is None:
            self._send(identity, Goodbye("this server does not know the connection; it may have been restarted"))
        else:
            raise PeerProtocolError(f"the client sent a {type(message).__name__} where Attach is due")

    def _refusal(self, hello: Hello) -> str | None:
        """Why these sizes are not granted, or None."""
        asked = hello.request_arena_bytes + hello.reply_arena_bytes
        taken = sum(sum(peer.sizes) for peer in self._peers.values())
        if len(self._peers) >= self._max_clients:
            return f"it serves {len(self._peers)} clients already, its max_clients"
        if asked > self._max_arena_bytes:
            return (
                f"{asked / MIB:.1f} MiB of arenas were asked for (requests and replies together); "
                f"its max_arena_bytes is {self._max_arena_bytes / MIB:.1f} MiB"
            )
        if asked + taken > self._max_total_arena_bytes:
            return (
                f"{asked / MIB:.1f} MiB of arenas were asked for; its {len(self._peers)} clients hold "
                f"{taken / MIB:.1f} MiB of the {self._max_total_arena_bytes / MIB:.1f} MiB of max_total_arena_bytes"
            )
        return None

    def _attach(self, peer: _Peer, attach: Attach) -> None:
        theirs = attach_peer(attach.segment, peer.sizes[0])
        own: Segment | None = None
        try:
            own = Segment.create(segment_layout(peer.sizes[1]))
            connection = Connection(own, theirs, attach.pid, self._counters, self._max_message_bytes)
        except SegmentError as error:
            theirs.close()
            self._send(peer.identity, Refused(shorten(str(error))))
            self._drop(peer, str(error))
            return
        except PeerProtocolError:
            theirs.close()
            if own is not None:
                own.close()
            raise
        peer.connection = connection
        peer.protocol = ServerProtocol(connection.codec, self._counters)
        self._send(peer.identity, Welcome(own.name, os.getpid()))
        logger.info(
            "client %d connected at %s (%s, %s channel): request arena %.1f MiB, reply arena %.1f MiB, process %d",
            peer.number,
            self.address,
            self.transport,
            self._channel.kind,
            peer.sizes[0] / MIB,
            peer.sizes[1] / MIB,
            connection.watch.pid,
        )

    def _drop_unfinished(self) -> None:
        """Forget clients that said Hello and then nothing."""
        limit = time.monotonic() - _HANDSHAKE_TIMEOUT_S
        for peer in [peer for peer in self._peers.values() if peer.connection is None and peer.since < limit]:
            self._drop(peer, "it did not finish the handshake")

    def _drop(self, peer: _Peer, reason: str) -> None:
        """Free all that a client held."""
        del self._peers[peer.identity]
        if peer.connection is None:
            return
        peer.connection.close()
        logger.info("client %d disconnected: %s", peer.number, reason)
        for callback in self._on_disconnect:
            callback(peer.number)

    def _send(self, identity: bytes, message: Message) -> None:
        """Send a message of the handshake; a client that is gone misses it."""
        self._channel.send(identity, encode(message))
