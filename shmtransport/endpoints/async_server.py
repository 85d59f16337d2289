"""The asyncio server: the same protocol and channels, driven by an event loop.

Rules that it keeps: handlers that are plain functions run in threads, and so does closing the channel; everything else
happens in the loop's thread. Nothing waits there, except a claim if ``claim_timeout_s`` is set. Works with any event
loop that has ``add_reader`` and ``add_signal_handler``, including uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from ..channels.base import deadline_in
from ..channels.doorbell_server import LoopDoorbells
from ..errors import Closed, LocalProtocolError
from ..memory.send_arena import FIRST_PAUSE_S, LONGEST_PAUSE_S
from ..protocol.calls import Call
from ..protocol.messages import CHANNEL_KINDS, DEFAULT_MAX_MESSAGE_BYTES, ChannelKind, More
from .async_parts import Credit, InProgress, Parts, parts_of
from .connection_memory import ASK_INTERVAL_S
from .deferred import LONGEST_DEVICE_PAUSE_S, encoded
from .event_loops import MESSAGES_AT_ONCE, called_by_signals, in_a_thread
from .options import DEFAULT_MAX_ARENA_BYTES, ServerOptions, whole
from .server_base import ServerBase
from .server_connection import IncomingCall, ServerConnection

logger = logging.getLogger("shmtransport")

_LONGEST_SATURATED_PAUSE_S = 0.05  # hundreds of streams may look


class AsyncServer(ServerBase[LoopDoorbells]):
    """Answers calls at ``address`` from an event loop.

    Handlers may be coroutine functions and asynchronous generators, which run in the loop, or plain functions and
    generators, which run in threads. So several may run at once, for one client too. A call that its client gives up is
    cancelled.

    Args:
        address: As for ``Server``, like all options that are not listed here.
        claim_timeout_s: As for ``Server``; it holds up the loop where a coroutine calls ``empty`` or a result is
            copied.
        drain_timeout_s: How long calls in progress may go on after ``stop``. A plain function that takes longer goes
            on by itself, and Python waits for it when the process exits. When a client has gone, its calls in
            progress may outlast the ``on_disconnect`` callbacks.
        max_calls_in_progress: How many calls of one client may be in progress; a call beyond that fails.
        threads: How many plain functions may run at the same time; None for as many as asyncio's own threads.

    Raises:
        TransportError: As ``Server``.
    """

    def __init__(
        self,
        address: str,
        *,
        max_arena_bytes: int = DEFAULT_MAX_ARENA_BYTES,
        max_total_arena_bytes: int | None = None,
        max_clients: int = 64,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        channels: Sequence[ChannelKind] = CHANNEL_KINDS,
        spin_us: float | None = None,
        claim_timeout_s: float = 0.0,
        drain_timeout_s: float | None = 5.0,
        prefault: bool = False,
        max_calls_in_progress: int = 256,
        threads: int | None = None,
        device: str | torch.device | None = None,
        debug: bool = False,
    ) -> None:
        options = ServerOptions.checked(
            max_arena_bytes=max_arena_bytes,
            max_total_arena_bytes=max_total_arena_bytes,
            max_clients=max_clients,
            max_message_bytes=max_message_bytes,
            channels=channels,
            spin_us=spin_us,
            claim_timeout_s=claim_timeout_s,
            drain_timeout_s=drain_timeout_s,
            prefault=prefault,
            threads=min(32, (os.cpu_count() or 1) + 4) if threads is None else threads,
            device=device,
            debug=debug,
        )
        self._max_calls_in_progress = whole("max_calls_in_progress", max_calls_in_progress)
        super().__init__(address, options, LoopDoorbells)
        self._stopped = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="shmtransport handler")
        self._cancelling = False  # calls in progress are cancelled
        self._closed = False
        self._close_when_served = False
        self._descriptor: int | None = None  # the channel's, while the loop reads from it
        self._asking: asyncio.TimerHandle | None = None

    async def serve(self) -> None:
        """Answer calls until ``stop``; in the main thread SIGINT and SIGTERM stop it too.

        Raises:
            Closed: the server was closed, or this process was forked from the one that made it.
            SystemExit, KeyboardInterrupt: a handler raised it; asyncio then ends the loop itself.
        """
        self._check_usable()
        self._stopped = asyncio.Event()  # an event belongs to one loop
        self._descriptor = self._zmq.fileno()
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_readable)
        try:
            with self._stopped_by_signals():
                self._on_readable()
                await self._stopped.wait()
                await self._drain()
        finally:
            self._stop_reading()
            if self._asking is not None:
                self._asking.cancel()
            if self._close_when_served:
                await self._close()

    async def close(self) -> None:
        """End all connections and remove the socket. A second call does nothing.

        In a handler this only stops ``serve``, which lets the calls in progress end and then closes the server.
        """
        if self._descriptor is not None and self._current.get(None) is not None:
            self._close_when_served = True
            self.stop()
        else:
            await self._close()

    async def _close(self) -> None:
        self._cancel_calls(list(self._calls))
        await asyncio.gather(*self._calls, return_exceptions=True)
        self._pool.shutdown(wait=False)
        self._closed = True
        self._at_drop.detach()
        self._stopping = True
        if self._descriptor is not None:  # ``serve`` is still running
            self._stop_reading()
            self._stopped.set()
        self._drop_all()
        await asyncio.wrap_future(in_a_thread(self._give_back))
        self._ended = self._ended or Closed("this server was closed")

    def _stop_reading(self) -> None:
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            self._descriptor = None

    async def __aenter__(self) -> AsyncServer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _on_readable(self) -> None:
        if self._closed:  # another thread has the channel now, to close it
            return
        self._drop_ended(self._channel.wait(0))
        if self._stopping:
            self._stopped.set()
        for _ in range(MESSAGES_AT_ONCE):
            received = self._receive()
            if isinstance(received, IncomingCall):
                self._begin(received.connection, received.box)
            elif not received:
                return
        asyncio.get_running_loop().call_soon(self._on_readable)

    def _connect(self, connection: ServerConnection) -> None:
        super()._connect(connection)
        if self._unwatched and self._asking is None:
            self._asking = asyncio.get_running_loop().call_later(ASK_INTERVAL_S, self._ask)

    def _ask(self) -> None:
        """Ask whether clients live of whose ends no descriptor tells."""
        self._asking = None
        self._ask_unwatched()
        if self._unwatched:
            self._asking = asyncio.get_running_loop().call_later(ASK_INTERVAL_S, self._ask)

    def _begin(self, connection: ServerConnection, box: list[Call]) -> None:
        if connection.in_progress >= self._max_calls_in_progress:
            call = box.pop()
            error = LocalProtocolError(
                f"{connection.in_progress} calls of this client are in progress; the server's max_calls_in_progress is "
                f"{self._max_calls_in_progress}: wait for some of them"
            )
            self._counters.count_call(0.0)
            self._reply(connection, self._failure(connection, call.call_id, call.method, error, call.is_answered))
            return
        connection.in_progress += 1
        self._cancel(connection, box[0].call_id)  # a client's own fault: it gave two calls the same number
        in_progress = InProgress(box[0])
        in_progress.task = asyncio.get_running_loop().create_task(self._serve_call(connection, in_progress, box))
        connection.streams[in_progress.call_id] = in_progress
        self._calls.add(in_progress.task)
        self._counters.count_in_flight(len(self._calls))
        in_progress.task.add_done_callback(functools.partial(self._task_ended, connection, in_progress, box))

    def _task_ended(
        self, connection: ServerConnection, in_progress: InProgress, box: list[Call], task: asyncio.Task[None]
    ) -> None:
        """A call's task has ended; it may have been cancelled before it began."""
        box.clear()
        in_progress.task = None  # a cycle: a cancelled task keeps its frames, and these this object
        self._calls.discard(task)
        self._leave(connection, in_progress)

    def _leave(self, connection: ServerConnection, in_progress: InProgress) -> None:
        """Count a call as in progress no longer, before its client learns of that; a second time does nothing."""
        if in_progress.over:
            return
        in_progress.over = True
        connection.in_progress -= 1
        if connection.streams.get(in_progress.call_id) is in_progress:
            del connection.streams[in_progress.call_id]
        self._counters.count_call(time.perf_counter() - in_progress.started)

    async def _serve_call(self, connection: ServerConnection, in_progress: InProgress, box: list[Call]) -> None:
        """Handle a call, taken out of its box so that its arguments live no longer than the handler holds them."""
        self._current.set(connection.reference)  # in this task's own context
        data = None
        try:
            data = await self._answer(connection, in_progress, box)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if self._is_cancelled(error, in_progress):
                raise
            data = self._failure(connection, in_progress.call_id, in_progress.method, error, in_progress.is_answered)
        finally:
            self._leave(connection, in_progress)
        self._reply(connection, data)
        del connection  # the traceback of a handler's error keeps this frame

    def _reply(self, connection: ServerConnection, data: bytes | None) -> None:
        super()._reply(connection, data)
        if data is not None:  # sending can consume the event that would have told of a request
            asyncio.get_running_loop().call_soon(self._on_readable)

    async def _answer(self, connection: ServerConnection, in_progress: InProgress, box: list[Call]) -> bytes | None:
        """Run the handler, send the parts of a stream, and return the reply, if there is to be one."""
        results = [await self._result(box)]
        if not in_progress.is_answered:
            return None
        if in_progress.credit is not None:
            parts = parts_of(in_progress.method, results.pop(), self._in_a_thread)
            await self._send_parts(connection, in_progress, parts, in_progress.credit)
            results.append(None)
        return await self._encoded(connection, in_progress, results)

    async def _result(self, box: list[Call]) -> Any:
        call = box.pop()
        handler = self._handlers.find(call.method, self)
        if inspect.iscoroutinefunction(handler):
            coroutine = handler(*call.arguments, **call.keywords)
            del call
            return await _run(coroutine)
        if inspect.isasyncgenfunction(handler):
            return handler(*call.arguments, **call.keywords)
        box.append(call)
        del call
        await self._in_a_thread(_handle, handler, box)
        result = box.pop()
        return await result if inspect.isawaitable(result) else result

    async def _send_parts(
        self, connection: ServerConnection, in_progress: InProgress, parts: Parts, credit: Credit
    ) -> None:
        """Send what a handler yields, no faster than the client takes it."""
        try:
            while True:
                await credit.take()
                await _until_not_saturated(connection)
                try:
                    box = [await parts.__anext__()]
                except StopAsyncIteration:
                    return
                self._reply(connection, await self._encoded(connection, in_progress, box, is_part=True))
                await asyncio.sleep(0)  # an asynchronous generator need not wait for anything, and others have calls
        finally:
            await parts.aclose()

    async def _encoded(
        self, connection: ServerConnection, in_progress: InProgress, box: list[Any], *, is_part: bool = False
    ) -> bytes:
        """Return the bytes of the result in the box; wait while there is no room for it."""
        outcome = encoded(connection, in_progress.call_id, box.pop(), is_part=is_part)
        if isinstance(outcome, bytes):
            return outcome
        outcome.begin(self._counters)
        pause_s = FIRST_PAUSE_S
        in_progress.waits_for_room = True
        try:
            while (data := outcome.encode()) is None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S if outcome.waits_for_room else LONGEST_DEVICE_PAUSE_S)
            return data
        finally:
            in_progress.waits_for_room = False
            outcome.end(self._counters)

    def _in_a_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Run a function in one of this server's threads, as the call of the running handler."""
        run = functools.partial(contextvars.copy_context().run, function, *arguments)
        return asyncio.get_running_loop().run_in_executor(self._pool, run)

    def _grant(self, connection: ServerConnection, more: More) -> None:
        in_progress: InProgress | None = connection.streams.get(more.call_id)
        if in_progress is not None and in_progress.credit is not None:
            in_progress.credit.add(more.count)

    def _cancel(self, connection: ServerConnection, call_id: int) -> None:
        in_progress: InProgress | None = connection.streams.get(call_id)
        if in_progress is not None:
            in_progress.cancel()

    def _end_streams(self, connection: ServerConnection) -> None:
        for in_progress in list(connection.streams.values()):
            if in_progress.credit is not None or in_progress.waits_for_room:
                in_progress.cancel()

    def _is_cancelled(self, error: BaseException, in_progress: InProgress) -> bool:
        """Whether this server, its client or the end of its loop ended a call, rather than the handler itself."""
        if isinstance(error, GeneratorExit):  # the handler's own comes while its task runs
            with contextlib.suppress(RuntimeError):
                return asyncio.current_task() not in self._calls
            return True
        return (self._cancelling or in_progress.cancelled) and isinstance(error, asyncio.CancelledError)

    async def _drain(self) -> None:
        """Wait for the calls in progress to end; cancel those that take too long."""
        deadline = deadline_in(self._options.drain_timeout_s)
        while self._calls and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._calls, timeout=left_s)  # what had arrived has been started
        if self._calls:
            logger.warning(
                "%d calls were still in progress after %g s", len(self._calls), self._options.drain_timeout_s
            )
            self._cancel_calls(self._calls)

    def _cancel_calls(self, calls: Iterable[asyncio.Task[None]]) -> None:
        """Cancel calls in progress; their callers learn from the goodbye that the server has ended."""
        self._cancelling = True
        for task in calls:
            task.cancel()

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with called_by_signals(asyncio.get_running_loop(), self.stop):
            yield


async def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await a handler's coroutine; if it raises, drop its arguments, which the traceback would keep."""
    frame = getattr(coroutine, "cr_frame", None)
    try:
        return await coroutine
    except BaseException:
        if frame is not None:
            frame.clear()
        raise


def _handle(handler: Callable[..., Any], box: list[Any]) -> None:
    """Run a plain handler in a thread: take the call out of the box and put the result in.

    An executor's thread may hold its argument and its result for a moment after it has answered. The box keeps both
    out of its hands: a caller that has the reply counts on the room that they took.
    """
    call: Call = box.pop()
    box.append(handler(*call.arguments, **call.keywords))


async def _until_not_saturated(connection: ServerConnection) -> None:
    """Wait while as many of the client's results wait for room as may."""
    pause_s = FIRST_PAUSE_S
    while connection.is_saturated:
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_SATURATED_PAUSE_S)
