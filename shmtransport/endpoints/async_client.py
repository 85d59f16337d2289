"""The asyncio client: the same protocol and channels, driven by an event loop.

Rules that it keeps: connecting and closing run in threads of their own, everything else in the loop's thread; nothing
waits in the loop's thread. Works with any event loop that has ``add_reader``, including uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any

from ..channels.backlog import QUEUE_LIMIT
from ..channels.base import deadline_in
from ..core import Counters
from ..errors import ArenaFull, Closed, LocalProtocolError, PeerDied, PeerProtocolError, TransportError
from ..protocol.in_flight import CallInFlight, OneWayCall
from ..protocol.messages import DEFAULT_MAX_MESSAGE_BYTES, Cancel, ChannelKind, encode
from ..protocol.uncompiled import uncompiled
from .async_reply_stream import AsyncReplyStream
from .awaited import AwaitedCall, AwaitedStream
from .built_in import ECHO, HEALTH, METHODS
from .client_base import ClientBase, ConnectionState, full_error, timeout_error
from .client_connection import Connecting
from .connection_memory import ASK_INTERVAL_S
from .event_loops import MESSAGES_AT_ONCE, in_a_thread
from .loop_connection import LoopConnection, close_unwanted, release_in
from .options import CONNECT_TIMEOUT_S, DEFAULT_ARENA_BYTES, ClientOptions, parts_ahead, seconds_or_no_limit
from .reply_stream import READ_AHEAD

_FIRST_PAUSE_S = 0.0
_LONGEST_PAUSE_S = 5e-3


@uncompiled
class AsyncClient(ClientBase[LoopConnection]):
    """A connection to a server on this machine, for an event loop.

    ``async with AsyncClient(address) as client: y = await client.call("linear", x, layer=0)``. Any number of calls may
    be in flight. A call that is cancelled is given up: what its late reply holds is released. A call waits for room;
    ``empty``, which can't be awaited, raises ``ArenaFull`` at once.

    Belongs to the event loop in which it was connected.

    Args:
        address: As for ``Client``, like all options.
        timeout_s: How long a call may take in all, in seconds. asyncio's own time-outs (``asyncio.timeout``,
            ``asyncio.wait_for``) may end it earlier.

    Raises:
        AddressError, LocalProtocolError: The address or an option is wrong; connecting is up to ``connect``.
    """

    def __init__(
        self,
        address: str,
        *,
        channel: ChannelKind = "zmq",
        spin_us: float | None = None,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        reply_arena_bytes: int | None = None,
        timeout_s: float | None = 60.0,
        connect_timeout_s: float | None = CONNECT_TIMEOUT_S,
        snapshot: bool = False,
        prefault: bool = False,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        options = ClientOptions.checked(
            channel=channel,
            spin_us=spin_us,
            arena_bytes=arena_bytes,
            reply_arena_bytes=reply_arena_bytes,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            snapshot=snapshot,
            prefault=prefault,
            max_message_bytes=max_message_bytes,
        )
        super().__init__(address, options, Counters(), ConnectionState())
        self._changing = asyncio.Lock()  # held while the connection is made or ended, by one of several tasks

    async def connect(self) -> AsyncClient:
        """Connect to the server; ``async with`` does it too.

        Raises:
            TransportError: as ``Client``.
        """
        async with self._changing:
            if self._state.connection is not None:
                raise LocalProtocolError("this client is connected already: use reconnect()")
            await self._open()
        return self

    async def reconnect(self) -> None:
        """Connect again, to the server that is at the address now; calls in flight fail with ``Closed``.

        Raises:
            TransportError: as ``Client``; afterwards this may be tried again.
        """
        async with self._changing:
            await self._shut("the client reconnects")
            await self._open()

    async def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the server and return its result.

        Args:
            method: the name under which the server registered the handler.
            *arguments: the handler's positional arguments; see ``Client.submit`` for what may be sent.
            **keywords: the handler's keyword arguments.

        Raises:
            CallTimeout: no reply within ``timeout_s``; what a late one holds is released.
            RemoteError: the handler raised.
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: nothing was sent.
            PeerDied, PeerProtocolError, Closed: the connection ended first.
        """
        reply = self._call(method, arguments, keywords, self._options.timeout_s)
        del arguments, keywords  # what the caller does not keep is free as soon as the server is done with it
        return await reply

    async def send(self, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """Call a method without waiting for it and without an answer; what it raises is logged at the server.

        Raises:
            CallTimeout, ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: Nothing was sent.
            PeerDied, PeerProtocolError, Closed: The connection has ended.
        """
        await self._begin(OneWayCall(method), arguments, keywords, self._options.timeout_s)

    def stream(self, method: str, /, *arguments: Any, **keywords: Any) -> AsyncReplyStream:
        """Call a method that is a generator, plain or asynchronous: ``async for part in client.stream("method", …)``.

        The call is made when the first part is asked for. The server is a few parts ahead at most (``read_ahead`` of
        ``with_options``), and these take up room of the reply arena. ``aclose``, which leaving an ``async with`` block
        does, ends the generator.
        """
        return self._stream(method, arguments, keywords, self._options.timeout_s, READ_AHEAD)

    async def ping(self) -> float:
        """Return how long a call that does nothing takes, in seconds; raises as ``call``."""
        started = time.perf_counter()
        await self.call(ECHO)
        return time.perf_counter() - started

    async def methods(self) -> list[str]:
        """Return the names of the server's methods, sorted; raises as ``call``."""
        names: list[str] = await self.call(METHODS)
        return names

    async def health(self) -> dict[str, Any]:
        """Return how the server is; see ``Server.health``. Raises as ``call``."""
        facts: dict[str, Any] = await self.call(HEALTH)
        return facts

    def with_options(self, *, timeout_s: float | None = None, read_ahead: int = READ_AHEAD) -> AsyncCallOptions:
        """Return this client with other options for the calls made by it; see ``Client.with_options``.

        Raises:
            LocalProtocolError: An option is wrong.
        """
        return AsyncCallOptions(
            self,
            self._options.timeout_s if timeout_s is None else seconds_or_no_limit("timeout_s", timeout_s),
            parts_ahead("read_ahead", read_ahead),
        )

    async def close(self) -> None:
        """End the connection; calls in flight fail with ``Closed``. Results stay valid. A second call does nothing."""
        async with self._changing:
            await self._shut("this client was closed")

    async def __aenter__(self) -> AsyncClient:
        return self if self._state.connection is not None else await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self) -> None:
        # No claim may block: ``_request`` waits, not the loop's thread.
        connecting = Connecting(self.address, self._options, 0.0, self._counters)
        opening = in_a_thread(LoopConnection, connecting, asyncio.get_running_loop())
        try:
            connection = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            connecting.cancel()
            opening.add_done_callback(close_unwanted)
            raise
        self._state.connection, self._state.ended = connection, None
        readable = connection.channel.fileno()
        connection.loop.add_reader(readable, _weakly(AsyncClient._on_readable, self, connection))
        descriptor = connection.memory.watch.fileno()
        connection.held.release_by = functools.partial(release_in, connection.loop, (readable, descriptor))
        if descriptor is not None:
            connection.loop.add_reader(descriptor, _weakly(AsyncClient._on_death, self, connection))
        else:
            self._ask_later(connection)

    def _ask_later(self, connection: LoopConnection) -> None:
        connection.loop.call_later(ASK_INTERVAL_S, _weakly(AsyncClient._ask, self, connection))

    def _call(
        self, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any], timeout_s: float
    ) -> Coroutine[Any, Any, Any]:
        pending = AwaitedCall(method, asyncio.get_running_loop().create_future())
        return self._finish(self._begin(pending, arguments, keywords, timeout_s), pending, timeout_s)

    async def _finish(
        self, sending: Coroutine[Any, Any, LoopConnection], pending: AwaitedCall, timeout_s: float
    ) -> Any:
        try:
            return await self._reply(await sending, pending, timeout_s)
        finally:
            # An error's traceback refers to this frame, and ``pending`` to the error: a reference cycle.
            del sending, pending

    def _stream(
        self, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any], timeout_s: float, window: int
    ) -> AsyncReplyStream:
        stream = AwaitedStream(method, window)
        begin = functools.partial(self._begin, stream, arguments, keywords, timeout_s)
        return AsyncReplyStream(stream, begin, self, timeout_s)

    async def _begin(
        self, call: CallInFlight, arguments: Sequence[Any], keywords: Mapping[str, Any], timeout_s: float
    ) -> LoopConnection:
        """Send a call, waiting for room; return the connection that it was sent over."""
        connection = self._state.live()
        deadline = deadline_in(timeout_s)
        data = await self._request(connection, call, arguments, keywords, deadline)
        if not isinstance(call, OneWayCall):
            connection.protocol.expect_reply(call)
        try:
            await self._send(connection, data, deadline, timeout_s)
        except BaseException:
            connection.protocol.take_back(call)
            raise
        call.data = None
        # Sending can consume the event that would have told of a reply.
        connection.loop.call_soon(self._on_readable, connection)
        return connection

    async def _request(
        self,
        connection: LoopConnection,
        pending: CallInFlight,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        deadline: float,
    ) -> bytes:
        """Encode a request; while there is no room, wait for the server to release tensors."""
        send_arena = connection.memory.send_arena
        pause_s = _FIRST_PAUSE_S
        started = 0.0
        while True:
            held_before = send_arena.held_by_peer
            try:
                data = connection.protocol.begin_call(pending, arguments, keywords)
            except ArenaFull:
                # All may have been released during this try, with the first tensors of this call placed around it.
                if time.monotonic() >= deadline or not (held_before or send_arena.held_by_peer):
                    raise
            else:
                if started:
                    self._counters.count_stalled(time.monotonic() - started)
                return data
            if not started:
                started = time.monotonic()
                self._counters.count_stall()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s + 50e-6, _LONGEST_PAUSE_S)
            self._check(connection)

    async def _send(self, connection: LoopConnection, data: bytes, deadline: float, timeout_s: float) -> None:
        """Send a request; wait while the queue is full."""
        self._check(connection)
        try:
            if connection.channel.send(data):
                return
            self._counters.count_stall()
            while not connection.channel.send(data):
                if time.monotonic() >= deadline:
                    raise full_error(timeout_s)
                await asyncio.sleep(_LONGEST_PAUSE_S)
                self._check(connection)
        except PeerProtocolError as error:
            self._end(connection, error)
            raise

    async def _reply(self, connection: LoopConnection, pending: AwaitedCall, timeout_s: float) -> Any:
        """Wait for the reply to what was sent."""
        left_s = max(pending.submitted + timeout_s - time.perf_counter(), 0.0)
        timer = connection.loop.call_later(left_s, self._on_timeout, connection, pending, timeout_s)
        try:
            await pending.arrived
            return pending.take_result()
        except asyncio.CancelledError:
            self.give_up(connection, pending, Closed("the call was cancelled"))
            raise
        finally:
            timer.cancel()
            del pending  # as in ``_finish``

    def give_up(self, connection: LoopConnection, call: CallInFlight, error: TransportError) -> None:
        """End a call with an error, and tell the server, if it has not ended already."""
        if not call.ended:
            connection.protocol.give_up(call, error)
            self.tell(connection, encode(Cancel(call.call_id)))

    def tell(self, connection: LoopConnection, data: bytes) -> None:
        """Tell the server something about a call that was sent before: now, or as soon as there is room."""
        connection.untold.append(data)
        if len(connection.untold) == 1:
            self._tell_all(connection)

    def _tell_all(self, connection: LoopConnection) -> None:
        if connection is not self._state.connection or self._state.ended is not None:
            return
        try:
            while connection.untold and connection.channel.send(connection.untold[0]):
                connection.untold.popleft()
        except PeerProtocolError as error:
            self._end(connection, error)
            return
        if connection.untold:
            connection.loop.call_later(_LONGEST_PAUSE_S, self._tell_all, connection)
        connection.loop.call_soon(self._on_readable, connection)  # as in ``_begin``

    def _check(self, connection: LoopConnection) -> None:
        if self._state.live() is not connection:
            raise Closed("the client was reconnected while this request was being made")

    def _on_readable(self, connection: LoopConnection) -> None:
        if self._receive(connection, MESSAGES_AT_ONCE):
            connection.loop.call_soon(self._on_readable, connection)

    def _receive(self, connection: LoopConnection, most: int) -> bool:
        """Take up to ``most`` messages; whether there may be more."""
        try:
            for _ in range(most):
                if self._state.ended is not None or connection is not self._state.connection:
                    return False
                data = connection.channel.receive()
                if data is None:
                    if connection.channel.ended():
                        self._on_death(connection)
                    return False
                connection.protocol.take_reply(data)
        except PeerDied as error:
            self._end(connection, error)
        except PeerProtocolError as error:
            connection.say_goodbye("protocol error")
            self._end(connection, error)
        return self._state.ended is None

    def _on_death(self, connection: LoopConnection) -> None:
        """The server's process has ended, or it has ended the connection."""
        if connection is not self._state.connection or self._state.ended is not None:
            return
        with contextlib.suppress(PeerDied, PeerProtocolError):
            while (data := connection.channel.receive()) is not None:  # replies that it sent before
                connection.protocol.take_reply(data)
        self._end(connection, connection.died() or PeerDied(f"{connection.server} has ended"))

    def _ask(self, connection: LoopConnection) -> None:
        """Ask whether the server lives, where no descriptor tells of its end."""
        if connection is self._state.connection and self._state.ended is None:
            if connection.died() is not None:
                self._on_death(connection)
            else:
                self._ask_later(connection)

    def _on_timeout(self, connection: LoopConnection, pending: AwaitedCall, timeout_s: float) -> None:
        self.check_in_time(connection, pending)
        self.give_up(connection, pending, timeout_error(pending, connection, timeout_s))

    def check_in_time(self, connection: LoopConnection, call: CallInFlight) -> bool:
        """Return whether a call is ready after all: the loop may have been late, and the reply may have arrived."""
        if not call.ready:
            self._receive(connection, QUEUE_LIMIT)
        return call.ready

    def _end(self, connection: LoopConnection, error: TransportError) -> None:
        """End this connection for good, with what every later use of it will raise."""
        if self._state.ended is not None or connection is not self._state.connection:
            return
        self._state.ended = error
        connection.loop.remove_reader(connection.channel.fileno())
        descriptor = connection.memory.watch.fileno()
        if descriptor is not None:
            connection.loop.remove_reader(descriptor)
        connection.protocol.fail_all(error)
        connection.closing = in_a_thread(functools.partial(connection.close, flush=self._state.flush))

    async def _shut(self, reason: str) -> None:
        connection = self._state.connection
        if connection is None:
            return
        if self._state.ended is None:
            connection.say_goodbye(reason)
            self._end(connection, Closed(reason))
        if connection.closing is not None:
            await asyncio.shield(asyncio.wrap_future(connection.closing))


@uncompiled
class AsyncCallOptions:
    """A client with other options for its calls; made by ``AsyncClient.with_options``."""

    def __init__(self, client: AsyncClient, timeout_s: float, read_ahead: int) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._read_ahead = read_ahead

    async def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """As ``AsyncClient.call``, with these options."""
        reply = self._client._call(method, arguments, keywords, self._timeout_s)  # noqa: SLF001
        del arguments, keywords  # as in ``AsyncClient.call``
        return await reply

    async def send(self, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """As ``AsyncClient.send``, with these options."""
        await self._client._begin(OneWayCall(method), arguments, keywords, self._timeout_s)  # noqa: SLF001

    def stream(self, method: str, /, *arguments: Any, **keywords: Any) -> AsyncReplyStream:
        """As ``AsyncClient.stream``, with this ``read_ahead``, and ``timeout_s`` for each part."""
        return self._client._stream(method, arguments, keywords, self._timeout_s, self._read_ahead)  # noqa: SLF001


def _weakly(
    method: Callable[[AsyncClient, LoopConnection], None], client: AsyncClient, connection: LoopConnection
) -> Callable[[], None]:
    """Make a callback for a loop that keeps neither the client nor its connection alive."""
    client_reference, connection_reference = weakref.ref(client), weakref.ref(connection)

    def call() -> None:
        client, connection = client_reference(), connection_reference()
        if client is not None and connection is not None:
            method(client, connection)

    return call
