"""The blocking server: one thread, many clients, each with its own pair of segments."""

from __future__ import annotations

import contextlib
import logging
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
from .connection import Connection
from .errors import LocalProtocolError, PeerProtocolError, TransportError
from .handshake import Admission, Limits
from .message import DEFAULT_MAX_MESSAGE_BYTES, MIN_MESSAGE_BYTES, Goodbye, Message, Refused, encode, shorten
from .protocol import Call, ServerProtocol
from .segment import shared_memory_bytes
from .statistics import Counters, Statistics
from .units import size_text

logger = logging.getLogger("shmtransport")

_ASK_INTERVAL_S = 0.5  # for clients whose process the kernel does not show to this one, as in another container

Handler = TypeVar("Handler", bound=Callable[..., Any])


class _Client:
    """One connected client; ``number`` is never used for another."""

    def __init__(self, identity: bytes, number: int, connection: Connection, counters: Counters) -> None:
        self.identity = identity
        self.number = number
        self.connection = connection
        self.protocol = ServerProtocol(connection.codec, counters)


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
        total_source = "set by its owner"
        if max_total_arena_bytes is None:
            max_total_arena_bytes, total_source = shared_memory_bytes() // 2, "half of /dev/shm"
        limits = Limits(max_arena_bytes, max_total_arena_bytes, max_clients, max_message_bytes, total_source)
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._on_disconnect: list[Callable[[int], None]] = []
        self._counters = Counters()
        self._admission = Admission(limits, self._counters)
        self._clients: dict[bytes, _Client] = {}
        self._connected = 0
        self._last_refused = b""
        self._current: ContextVar[_Client] = ContextVar("current client")
        self._stopping = threading.Event()
        if max_message_bytes < MIN_MESSAGE_BYTES:
            raise LocalProtocolError(f"max_message_bytes must be {MIN_MESSAGE_BYTES} or more, not {max_message_bytes}")
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
        return self._caller().connection.send_arena.empty(shape, dtype)

    def statistics(self) -> Statistics:
        """Totals over all clients since this server was made."""
        return self._counters.snapshot()

    def serve(self) -> None:
        """Answer calls until ``stop``; in the main thread SIGINT and SIGTERM stop it too, after the current call."""
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
        for client in list(self._clients.values()):
            self._send(client.identity, Goodbye("the server was shut down"))
            self._drop(client, "server shut down")
        self._channel.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _caller(self) -> _Client:
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
        # A signal that comes just before the poll blocks would otherwise be handled only when the poll returns.
        previous_fd = signal.set_wakeup_fd(self._channel.wake_descriptor, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _idle(self) -> None:
        """Nothing to answer: block until there is, or a client's process ends."""
        watched = {
            fd: client for client in self._clients.values() if (fd := client.connection.watch.fileno()) is not None
        }
        unseen = [client for client in self._clients.values() if client.connection.watch.must_be_asked]
        for fd in self._channel.wait(watched, _ASK_INTERVAL_S if unseen else None):
            self._drop(watched[fd], "its process ended")
        for client in unseen:
            if not client.connection.watch.alive():
                self._drop(client, "its process ended")

    def _take(self, identity: bytes, data: bytes) -> None:
        """Handle one message; a malformed one costs its sender the connection, nothing else."""
        client = self._clients.get(identity)
        if client is None:
            self._admit(identity, data)
            return
        try:
            answer = self._answer(client, data)
        except PeerProtocolError as error:
            logger.warning("client %d: %s", client.number, error)
            self._send(identity, Goodbye(shorten(f"protocol error: {error}")))
            self._drop(client, "protocol error")
            return
        if answer is None:
            self._drop(client, "it said goodbye")
        elif not self._channel.send(identity, answer):
            self._drop(client, "it no longer reads its replies")

    def _admit(self, identity: bytes, data: bytes) -> None:
        try:
            answer, admitted = self._admission.receive(identity, data)
        except PeerProtocolError as error:
            answer, admitted = Refused(shorten(str(error))), None
        if isinstance(answer, Refused) and identity != self._last_refused:
            self._last_refused = identity  # one that goes on sending is not logged again
            logger.warning("a client was refused: %s", answer.reason)
        if admitted is not None:
            self._connected += 1
            client = _Client(identity, self._connected, admitted.connection, self._counters)
            self._clients[identity] = client
            logger.info(
                "client %d connected at %s (%s, %s channel): request arena %s, reply arena %s, process %d",
                client.number,
                self.address,
                self.transport,
                self._channel.kind,
                size_text(admitted.sizes.request_arena_bytes),
                size_text(admitted.sizes.reply_arena_bytes),
                client.connection.watch.pid,
            )
        if answer is not None and not self._send(identity, answer):
            if identity in self._clients:
                self._drop(self._clients[identity], "it went away while connecting")
            else:
                self._admission.forget(identity)

    def _answer(self, client: _Client, data: bytes) -> bytes | None:
        """The bytes of the answer to a client's message; None if it said goodbye.

        By the time it returns, neither arguments nor result are held here any more: whoever has the reply may count
        on the room that they took.
        """
        call = client.protocol.receive(data)
        if call is None:
            return None
        started = time.perf_counter()
        token = self._current.set(client)
        try:
            return client.protocol.reply(call.call_id, self._handle(call))
        except Exception as error:  # whatever a handler raises is its caller's to know
            self._counters.failures += 1
            if not isinstance(error, TransportError):
                logger.exception("handler %r raised", call.method)
            return client.protocol.failure(call.call_id, error)
        finally:
            self._current.reset(token)
            self._counters.calls += 1
            self._counters.call_seconds += time.perf_counter() - started

    def _handle(self, call: Call) -> Any:
        handler = self._handlers.get(call.method)
        if handler is None:
            raise LocalProtocolError(
                f"there is no method {call.method!r}; there are: {', '.join(sorted(self._handlers)) or 'none'}"
            )
        return handler(*call.arguments, **call.keywords)

    def _drop(self, client: _Client, reason: str) -> None:
        """Free all that a client held."""
        del self._clients[client.identity]
        self._admission.forget(client.identity)
        client.connection.close()
        logger.info("client %d disconnected: %s", client.number, reason)
        for callback in self._on_disconnect:
            try:
                callback(client.number)
            except Exception:  # noqa: PERF203 - one service's mistake must not end the others' clients
                logger.exception("an on_disconnect callback raised")

    def _send(self, identity: bytes, message: Message) -> bool:
        """Send a message that is no reply; False if the client is gone."""
        return self._channel.send(identity, encode(message))
