"""What a user of an event loop holds of a streaming call: an asynchronous iterator over its parts."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Protocol

from ..errors import CallCancelled, TransportError
from ..memory.forks import BoundToProcess
from ..protocol.in_flight import CallInFlight
from ..protocol.uncompiled import uncompiled
from .awaited import AwaitedStream
from .client_base import timeout_error
from .loop_connection import LoopConnection


class Progress(Protocol):
    """What a client does for its streams."""

    def check_in_time(self, connection: LoopConnection, call: CallInFlight) -> bool:
        """Receive what has arrived; return whether the call is ready."""

    def give_up(self, connection: LoopConnection, call: CallInFlight, error: TransportError) -> None:
        """End a call with an error, and tell the server, if it has not ended already."""

    def tell(self, connection: LoopConnection, data: bytes) -> None:
        """Send a message about a call that was sent before."""


@uncompiled
class AsyncReplyStream(BoundToProcess, AsyncIterator[Any]):
    """The parts of a streaming call, as they arrive; made by ``AsyncClient.stream``.

    A part's tensors are borrowed, as those of any result. One task at a time may iterate.
    """

    def __init__(
        self,
        stream: AwaitedStream,
        begin: Callable[[], Awaitable[LoopConnection]],
        client: Progress,
        timeout_s: float,
    ) -> None:
        self._stream = stream
        self._begin: Callable[[], Awaitable[LoopConnection]] | None = begin
        self._client = client
        self._timeout_s = timeout_s
        self._connection: LoopConnection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = True

    @property
    def method(self) -> str:
        """The name of the method that is called."""
        return self._stream.method

    async def __anext__(self) -> Any:
        """Wait for the next part, for up to ``timeout_s`` seconds; the first makes the call. A cancelled wait closes
        the stream.

        Raises:
            StopAsyncIteration: The generator has ended, or this stream was closed.
            CallTimeout: No part in time; the stream stays open, and may be asked again.
            RemoteError: The generator raised; the parts before that have been returned.
            TransportError: As ``AsyncClient.call``.
        """
        if not self._is_open:
            raise StopAsyncIteration
        try:
            connection = await self._connected()
            if connection is None:
                raise StopAsyncIteration
            in_time = await self._stream.wait(self._timeout_s if self._timeout_s < math.inf else None)
            if not in_time and not self._client.check_in_time(connection, self._stream):
                raise timeout_error(self._stream, connection, self._timeout_s)
        except asyncio.CancelledError:
            self._close()
            raise
        try:
            part = self._stream.take_part()
        except StopIteration:
            self._is_open = False
            raise StopAsyncIteration from None
        except BaseException:
            self._is_open = False
            raise
        finally:
            more = self._stream.more()
            if more is not None:
                self._client.tell(connection, more)
            del self  # an error's traceback keeps this frame
        return part

    async def aclose(self) -> None:
        """End the generator, and forget the parts that were not taken. A second call does nothing."""
        self._close()

    async def __aenter__(self) -> AsyncReplyStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    def __del__(self) -> None:
        """Close a stream that was dropped, as asyncio does with a generator; may run on any thread."""
        with contextlib.suppress(AttributeError, RuntimeError):  # it was not made, or the loop is closed
            if self._connection is not None and self._loop is not None and not self._stream.ended:
                error = CallCancelled(f"the stream of {self.method!r} was dropped")
                self._loop.call_soon_threadsafe(self._client.give_up, self._connection, self._stream, error)

    def __repr__(self) -> str:
        state = "open" if self._is_open and not self._stream.ended else "ended"
        return f"<AsyncReplyStream {self.method!r}: {state}>"

    async def _connected(self) -> LoopConnection | None:
        """Make the call, if it was not made yet; return its connection, or None if it could not be made."""
        if self._begin is not None:
            begin, self._begin = self._begin, None
            self._connection = await begin()
            self._loop = asyncio.get_running_loop()
        return self._connection

    def _close(self) -> None:
        self._is_open = False
        self._begin = None
        if self._connection is not None:
            error = CallCancelled(f"the stream of {self.method!r} was closed")
            self._client.give_up(self._connection, self._stream, error)
        self._stream.drop_parts()
