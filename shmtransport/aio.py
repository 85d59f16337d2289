"""The asyncio client and server: the same protocol and channels, driven by an event loop.

Rules that they keep: everything happens in the loop's thread, except connecting and closing, which may take a while,
and handlers that are plain functions; nothing waits in the loop's thread. Works with any event loop that has
``add_reader``, uvloop among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from .channel import deadline_in
from .client import ClientBase
from .errors import ArenaFull, Closed, LocalProtocolError, PeerDied, PeerProtocolError, TransportError
from .host import Arrival, Host, HostedClient
from .link import Link
from .protocol import Call, PendingReply

logger = logging.getLogger("shmtransport")

_ASK_INTERVAL_S = 0.5  # for peers whose process the kernel does not show to this one, as in another container
_MESSAGES_AT_ONCE = 64  # then the loop's other work has its turn
_FIRST_PAUSE_S = 0.0
_LONGEST_PAUSE_S = 5e-3


class _AwaitedReply(PendingReply):
    """A call in flight whose outcome goes to a future."""

    __slots__ = ("future",)

    def __init__(self, method: str, future: asyncio.Future[Any]) -> None:
        super().__init__(method, _never_wait)
        self.future = future

    def resolve(self, result: Any) -> None:
        self.done = True
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        self.done = True
        if not self.future.done():
            self.future.set_exception(error)


def _never_wait(_pending: PendingReply, _timeout_s: float | None) -> None:
    raise LocalProtocolError("this reply is awaited, not waited for")


class AsyncClient(ClientBase):
    """A connection to a server on this machine, for an event loop; for its options see ``Client``.

    ``async with AsyncClient(address) as client: y = await client.call("linear", x, layer=0)``. Any number of calls may
    be in flight. A call that is cancelled is given up: what its late reply holds is released. Time-outs other than
    ``timeout_s`` are asyncio's own (``asyncio.timeout``, ``asyncio.wait_for``).

    Belongs to the event loop in which it was connected.
    """

    async def connect(self) -> AsyncClient:
        """Connect; ``async with`` does it too.

        Raises:
            As ``Client``.
        """
        if self._link is not None:
            raise LocalProtocolError("this client is connected already: use reconnect()")
        await self._open()
        return self

    async def reconnect(self) -> None:
        """Connect anew, to whichever server is at the address now; calls in flight fail with ``Closed``.

        Raises:
            As ``Client``; afterwards this may be tried again.
        """
        await self._shut("the client reconnects")
        await self._open()

    async def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the server; see ``Client.submit`` for what may be sent.

        Raises:
            CallTimeout: no reply within ``timeout_s``; a late one is thrown away.
            RemoteError: the handler raised.
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: nothing was sent.
            PeerDied, PeerProtocolError, Closed: the connection ended first.
        """
        link = self._live()
        loop = asyncio.get_running_loop()
        pending = _AwaitedReply(method, loop.create_future())
        deadline = deadline_in(self._timeout_s)
        data = await self._request(link, pending, arguments, keywords, deadline)
        link.protocol.start(pending)
        try:
            await self._send(link, data, deadline)
        except BaseException:
            link.protocol.take_back(pending)
            raise
        loop.call_soon(self._on_readable, link)  # sending may have taken away what would tell of a reply
        timer = loop.call_later(max(deadline - time.monotonic(), 0.0), self._on_timeout, link, pending)
        try:
            return await pending.future
        except asyncio.CancelledError:
            link.protocol.give_up(pending, Closed("the call was cancelled"))
            raise
        finally:
            timer.cancel()

    async def close(self) -> None:
        """End the connection; calls in flight fail with ``Closed``. Results stay valid. A second call does nothing."""
        await self._shut("this client was closed")

    async def __aenter__(self) -> AsyncClient:
        return self if self._link is not None else await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _claim_timeout_s(self) -> float:
        return 0.0  # ``_request`` waits, not the loop's thread

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        opening = self._loop.run_in_executor(None, Link, self._options, self._counters)
        try:
            link = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise
        self._link, self._ended = link, None
        self._closing: asyncio.Future[None] | None = None
        self._loop.add_reader(link.channel.fileno(), self._on_readable, link)
        descriptor = link.connection.watch.fileno()
        if descriptor is not None:
            self._loop.add_reader(descriptor, self._on_death, link)
        else:
            self._loop.call_later(_ASK_INTERVAL_S, self._ask, link)

    async def _request(
        self,
        link: Link,
        pending: _AwaitedReply,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        deadline: float,
    ) -> bytes:
        """The request's bytes; waits for the server to release something while there is no room."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return link.protocol.request(pending, arguments, keywords)
            except ArenaFull:
                if time.monotonic() >= deadline or not link.connection.send_arena.held_by_peer:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s + 50e-6, _LONGEST_PAUSE_S)
            self._check(link)

    async def _send(self, link: Link, data: bytes, deadline: float) -> None:
        """Send a request; waits while the queue is full."""
        self._check(link)
        try:
            while not link.channel.send(data):
                if time.monotonic() >= deadline:
                    raise self._full_error()
                self._counters.stalls += 1
                await asyncio.sleep(_LONGEST_PAUSE_S)
                self._check(link)
        except PeerProtocolError as error:
            self._end(link, error)
            raise

    def _check(self, link: Link) -> None:
        if self._live() is not link:
            raise Closed("the client was reconnected while this request was being made")

    def _on_readable(self, link: Link) -> None:
        try:
            for _ in range(_MESSAGES_AT_ONCE):
                if self._ended is not None or link is not self._link:
                    return
                data = link.channel.receive()
                if data is None:
                    if link.channel.ended():
                        self._on_death(link)
                    return
                link.protocol.receive(data)
        except PeerDied as error:
            self._end(link, error)
        except PeerProtocolError as error:
            link.say_goodbye("protocol error")
            self._end(link, error)
        else:
            self._loop.call_soon(self._on_readable, link)

    def _on_death(self, link: Link) -> None:
        """The server's process has ended, or it has ended the connection."""
        if link is not self._link or self._ended is not None:
            return
        with contextlib.suppress(PeerDied, PeerProtocolError):
            while (data := link.channel.receive()) is not None:  # the replies that it sent before
                link.protocol.receive(data)
        self._end(link, link.died() or PeerDied(f"{link.server} has ended"))

    def _ask(self, link: Link) -> None:
        """In place of a descriptor that would tell of the server's end."""
        if link is self._link and self._ended is None:
            if link.died() is not None:
                self._on_death(link)
            else:
                self._loop.call_later(_ASK_INTERVAL_S, self._ask, link)

    def _on_timeout(self, link: Link, pending: _AwaitedReply) -> None:
        if not pending.done:
            link.protocol.give_up(pending, self._timeout_error(link, pending, self._timeout_s))

    def _end(self, link: Link, error: TransportError) -> None:
        """End this connection for good, with what every later use of it will raise."""
        if self._ended is not None or link is not self._link:
            return
        self._ended = error
        self._loop.remove_reader(link.channel.fileno())
        descriptor = link.connection.watch.fileno()
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
        link.protocol.fail_all(error)
        self._closing = self._loop.run_in_executor(None, functools.partial(link.close, flush=self._flush()))

    async def _shut(self, reason: str) -> None:
        link = self._link
        if link is None:
            return
        if self._ended is None:
            link.say_goodbye(reason)
            self._end(link, Closed(reason))
        if self._closing is not None:
            await asyncio.shield(self._closing)


def _close_unwanted(opening: asyncio.Future[Link]) -> None:
    """Connecting was cancelled, and has succeeded nevertheless."""
    if not opening.cancelled() and opening.exception() is None:
        link = opening.result()
        link.say_goodbye("connecting was cancelled")
        link.close(flush=True)


class AsyncServer(Host):
    """Answers calls at ``address`` from an event loop; for its options see ``Server``.

    Handlers may be coroutine functions, which run in the loop, or plain functions, which run in threads; so several
    may run at the same time, also for one client. ``max_calls_in_progress`` bounds them for each client: a call
    beyond it fails. ``drain_timeout_s`` is how long calls in progress may go on after ``stop``.
    """

    def __init__(self, address: str, *, max_calls_in_progress: int = 256, **options: Any) -> None:
        super().__init__(address, **options)
        self._max_calls_in_progress = max_calls_in_progress
        self._calls: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer calls until ``stop``; in the main thread SIGINT and SIGTERM stop it too."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        descriptor = self._channel.fileno()
        self._loop.add_reader(descriptor, self._on_readable)
        try:
            with self._stopped_by_signals():
                self._on_readable()
                while not self._stopped.is_set():
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._stopped.wait(), _ASK_INTERVAL_S if self._unwatched else None)
                    self._ask_unwatched()
                await self._drain()
        finally:
            self._loop.remove_reader(descriptor)

    async def close(self) -> None:
        """End all connections and remove the socket. A second call does nothing."""
        for task in list(self._calls):
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        self._drop_all()
        await asyncio.to_thread(self._channel.close)

    async def __aenter__(self) -> AsyncServer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _on_readable(self) -> None:
        self._drop_ended(self._channel.wait(0))
        if self._stopping.is_set():
            self._stopped.set()
        for _ in range(_MESSAGES_AT_ONCE):
            received = self._receive()
            if isinstance(received, Arrival):
                self._begin(*received)
            elif not received:
                return
        self._loop.call_soon(self._on_readable)

    def _begin(self, client: HostedClient, call: Call) -> None:
        if client.in_progress >= self._max_calls_in_progress:
            error = LocalProtocolError(
                f"{client.in_progress} calls of this client are in progress; the server's max_calls_in_progress is "
                f"{self._max_calls_in_progress}: wait for some of them"
            )
            self._reply(client, self._failure(client, call, error))
            return
        client.in_progress += 1
        task = self._loop.create_task(self._serve_call(client, [call]))
        self._calls.add(task)
        self._counters.in_flight_peak = max(self._counters.in_flight_peak, len(self._calls))
        task.add_done_callback(self._calls.discard)

    async def _serve_call(self, client: HostedClient, call: list[Call]) -> None:
        """Handle a call, taken out of its list so that nothing holds its arguments longer than the handler does."""
        started = time.perf_counter()
        self._current.set(client)  # in this task's own context
        try:
            data = await self._answer(client, call.pop())
        finally:
            client.in_progress -= 1
            self._counters.count_call(time.perf_counter() - started)
        self._reply(client, data)
        self._loop.call_soon(self._on_readable)  # sending may have taken away what would tell of a request

    async def _answer(self, client: HostedClient, call: Call) -> bytes:
        try:
            handler = self._handler(call)
            if inspect.iscoroutinefunction(handler):
                result = await handler(*call.arguments, **call.keywords)
            else:
                result = await asyncio.to_thread(handler, *call.arguments, **call.keywords)
                if inspect.isawaitable(result):
                    result = await result
            return client.protocol.reply(call.call_id, result)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its caller's to know
            return self._failure(client, call, error)

    async def _drain(self) -> None:
        """Let the calls in progress end; those that take too long are cancelled."""
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=self._drain_timeout_s)
            for task in late:
                task.cancel()
            if late:
                logger.warning("%d calls were still in progress after %g s", len(late), self._drain_timeout_s)

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            self._loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in numbers:
                self._loop.remove_signal_handler(number)
