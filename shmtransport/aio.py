"""The asyncio client: the same protocol and channels, driven by an event loop.

Rules that it keeps: everything happens in the loop's thread, except connecting and closing, which may take a while;
nothing waits in the loop's thread. Works with any event loop that has ``add_reader``, uvloop among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from .backlog import QUEUE_LIMIT
from .channel import deadline_in
from .client import ClientBase
from .errors import ArenaFull, Closed, LocalProtocolError, PeerDied, PeerProtocolError, TransportError
from .link import Connecting, Link
from .protocol import PendingReply
from .threads import in_a_thread
from .uncompiled import uncompiled

_ASK_INTERVAL_S = 0.5  # for peers whose process the kernel does not show to this one, as in another container
_MESSAGES_AT_ONCE = 64  # then the loop's other work has its turn
_FIRST_PAUSE_S = 0.0
_LONGEST_PAUSE_S = 5e-3


class _AwaitedReply(PendingReply):
    """A call in flight; ``ended`` is done when it is, and holds neither result nor error: the loop keeps it longer."""

    def __init__(self, method: str, ended: asyncio.Future[None]) -> None:
        super().__init__(method, _never_wait)
        self.ended = ended

    def resolve(self, result: Any) -> None:
        super().resolve(result)
        self._wake()

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._wake()

    def _wake(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def _never_wait(_pending: PendingReply, _timeout_s: float | None) -> None:
    raise LocalProtocolError("this reply is awaited, not waited for")


@uncompiled
class AsyncClient(ClientBase):
    """A connection to a server on this machine, for an event loop; for its options see ``Client``.

    ``async with AsyncClient(address) as client: y = await client.call("linear", x, layer=0)``. Any number of calls may
    be in flight. A call that is cancelled is given up: what its late reply holds is released. Time-outs other than
    ``timeout_s`` are asyncio's own (``asyncio.timeout``, ``asyncio.wait_for``). A call waits for room; ``empty``, which
    can't be awaited, raises ``ArenaFull`` at once.

    Belongs to the event loop in which it was connected.
    """

    @functools.cached_property
    def _changing(self) -> asyncio.Lock:
        """Held while the connection is made or ended: several tasks may ask for that at once."""
        return asyncio.Lock()

    async def connect(self) -> AsyncClient:
        """Connect; ``async with`` does it too.

        Raises:
            As ``Client``.
        """
        async with self._changing:
            if self._link is not None:
                raise LocalProtocolError("this client is connected already: use reconnect()")
            await self._open()
        return self

    async def reconnect(self) -> None:
        """Connect anew, to whichever server is at the address now; calls in flight fail with ``Closed``.

        Raises:
            As ``Client``; afterwards this may be tried again.
        """
        async with self._changing:
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
        pending = _AwaitedReply(method, asyncio.get_running_loop().create_future())
        deadline = deadline_in(self._timeout_s)
        try:
            data = await self._request(link, pending, arguments, keywords, deadline)
            link.protocol.start(pending)
            try:
                await self._send(link, data, deadline)
            except BaseException:
                link.protocol.take_back(pending)
                raise
            return await self._reply(link, pending, deadline)
        finally:
            # An error's traceback holds this frame, and pending the error: a cycle.
            del pending, arguments, keywords

    async def close(self) -> None:
        """End the connection; calls in flight fail with ``Closed``. Results stay valid. A second call does nothing."""
        async with self._changing:
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
        connecting = Connecting(self._options, self._counters)
        opening = in_a_thread(Link, connecting)
        try:
            link = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            connecting.cancel()
            opening.add_done_callback(_close_unwanted)
            raise
        self._link, self._ended = link, None
        self._closing: Future[None] | None = None
        readable = link.channel.fileno()
        self._loop.add_reader(readable, _weakly(AsyncClient._on_readable, self, link))
        descriptor = link.connection.watch.fileno()
        link.held.release_by = functools.partial(_release_in, self._loop, (readable, descriptor))
        if descriptor is not None:
            self._loop.add_reader(descriptor, _weakly(AsyncClient._on_death, self, link))
        else:
            self._ask_later(link)

    def _ask_later(self, link: Link) -> None:
        self._loop.call_later(_ASK_INTERVAL_S, _weakly(AsyncClient._ask, self, link))

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
        started = 0.0
        while True:
            try:
                data = link.protocol.request(pending, arguments, keywords)
            except ArenaFull:
                if time.monotonic() >= deadline or not link.connection.send_arena.held_by_peer:
                    raise
            else:
                if started:
                    self._counters.stall_seconds += time.monotonic() - started
                return data
            if not started:
                started = time.monotonic()
                self._counters.stalls += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s + 50e-6, _LONGEST_PAUSE_S)
            self._check(link)

    async def _send(self, link: Link, data: bytes, deadline: float) -> None:
        """Send a request; waits while the queue is full."""
        self._check(link)
        try:
            if link.channel.send(data):
                return
            self._counters.stalls += 1
            while not link.channel.send(data):
                if time.monotonic() >= deadline:
                    raise self._full_error()
                await asyncio.sleep(_LONGEST_PAUSE_S)
                self._check(link)
        except PeerProtocolError as error:
            self._end(link, error)
            raise

    async def _reply(self, link: Link, pending: _AwaitedReply, deadline: float) -> Any:
        """Wait for the reply to what was sent."""
        self._loop.call_soon(self._on_readable, link)  # sending may have taken away what would tell of a reply
        timer = self._loop.call_later(max(deadline - time.monotonic(), 0.0), self._on_timeout, link, pending)
        try:
            await pending.ended
            return pending.result()
        except asyncio.CancelledError:
            link.protocol.give_up(pending, Closed("the call was cancelled"))
            raise
        finally:
            timer.cancel()
            del pending  # as in ``call``

    def _check(self, link: Link) -> None:
        if self._live() is not link:
            raise Closed("the client was reconnected while this request was being made")

    def _on_readable(self, link: Link) -> None:
        if self._receive(link, _MESSAGES_AT_ONCE):
            self._loop.call_soon(self._on_readable, link)

    def _receive(self, link: Link, most: int) -> bool:
        """Take up to so many messages; whether there may be more."""
        try:
            for _ in range(most):
                if self._ended is not None or link is not self._link:
                    return False
                data = link.channel.receive()
                if data is None:
                    if link.channel.ended():
                        self._on_death(link)
                    return False
                link.protocol.receive(data)
        except PeerDied as error:
            self._end(link, error)
        except PeerProtocolError as error:
            link.say_goodbye("protocol error")
            self._end(link, error)
        return self._ended is None

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
                self._ask_later(link)

    def _on_timeout(self, link: Link, pending: _AwaitedReply) -> None:
        if not pending.done:
            self._receive(link, QUEUE_LIMIT)  # it may be the loop that took too long, and the reply may be there
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
        self._closing = in_a_thread(functools.partial(link.close, flush=self._flush()))

    async def _shut(self, reason: str) -> None:
        link = self._link
        if link is None:
            return
        if self._ended is None:
            link.say_goodbye(reason)
            self._end(link, Closed(reason))
        if self._closing is not None:
            await asyncio.shield(asyncio.wrap_future(self._closing))


def _weakly(method: Callable[[AsyncClient, Link], None], client: AsyncClient, link: Link) -> Callable[[], None]:
    """A callback for a loop that keeps neither the client nor its link alive."""
    client_reference, link_reference = weakref.ref(client), weakref.ref(link)

    def call() -> None:
        client, link = client_reference(), link_reference()
        if client is not None and link is not None:
            method(client, link)

    return call


def _release_in(
    loop: asyncio.AbstractEventLoop, descriptors: Sequence[int | None], release: Callable[[], None]
) -> None:
    """Give back what a client held that was dropped, in its loop if that still runs: on whichever thread this is."""

    def remove_and_release() -> None:
        for descriptor in descriptors:
            if descriptor is not None:
                loop.remove_reader(descriptor)
        release()

    try:
        loop.call_soon_threadsafe(remove_and_release)
    except RuntimeError:  # it is closed
        release()


def _close_unwanted(opening: Future[Link]) -> None:
    """Connecting was cancelled, and may have succeeded nevertheless; in the thread that connected, most likely."""
    if not opening.cancelled() and opening.exception() is None:
        link = opening.result()
        link.say_goodbye("connecting was cancelled")
        link.close(flush=True)
