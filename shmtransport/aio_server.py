"""The asyncio server: the same protocol and channels, driven by an event loop.

Rules that it keeps: everything happens in the loop's thread, except handlers that are plain functions, and closing;
nothing waits in the loop's thread. Works with any event loop that has ``add_reader``, uvloop among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any

from . import options
from .channel import deadline_in
from .errors import Closed, LocalProtocolError
from .host import Host
from .hosted import Arrival, HostedClient
from .protocol import Call
from .threads import in_a_thread

logger = logging.getLogger("shmtransport")

_ASK_INTERVAL_S = 0.5  # for clients whose process the kernel does not show to this one, as in another container
_MESSAGES_AT_ONCE = 64  # then the loop's other work has its turn


class AsyncServer(Host):
    """Answers calls at ``address`` from an event loop; for its options see ``Server``.

    Handlers may be coroutine functions, which run in the loop, or plain functions, which run in threads; so several
    may run at the same time, also for one client. ``max_calls_in_progress`` bounds them for each client: a call
    beyond it fails. ``drain_timeout_s`` is how long calls in progress may go on after ``stop``; a plain function that
    takes longer goes on by itself, and Python waits for it when the process exits. ``claim_timeout_s`` holds up the
    loop when a coroutine calls ``empty`` or a result is copied. When a client has gone, its calls in progress may
    still go on after the ``on_disconnect`` callbacks.
    """

    def __init__(self, address: str, *, max_calls_in_progress: int = 256, **others: Any) -> None:
        self._max_calls_in_progress = options.whole("max_calls_in_progress", max_calls_in_progress)
        super().__init__(address, **others)
        self._calls: set[asyncio.Task[None]] = set()
        self._cutting = False  # calls in progress are cancelled
        self._closed = False
        self._close_when_served = False
        self._descriptor: int | None = None  # the channel's, while the loop reads from it
        self._asking: asyncio.TimerHandle | None = None

    async def serve(self) -> None:
        """Answer calls until ``stop``; in the main thread SIGINT and SIGTERM stop it too.

        Raises:
            Closed: the server was closed, or this process was forked from the one that made it.
            SystemExit, KeyboardInterrupt: as asyncio does it, a handler's end the loop itself.
        """
        self._check_usable()
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._descriptor = self._channel.fileno()
        self._loop.add_reader(self._descriptor, self._on_readable)
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

        In a handler this only stops ``serve``, which closes the server when it has answered what has come.
        """
        if self._descriptor is not None and self._current.get(None) is not None:
            self._close_when_served = True
            self.stop()
        else:
            await self._close()

    async def _close(self) -> None:
        self._cut(list(self._calls))
        await asyncio.gather(*self._calls, return_exceptions=True)
        self._closed = True
        self._at_drop.detach()
        self._stopping.set()
        if self._descriptor is not None:  # ``serve`` is still running
            self._stop_reading()
            self._stopped.set()
        self._drop_all()
        await asyncio.wrap_future(in_a_thread(self._channel.close))
        self._ended = self._ended or Closed("this server was closed")

    def _stop_reading(self) -> None:
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            self._descriptor = None

    async def __aenter__(self) -> AsyncServer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _on_readable(self) -> None:
        if self._closed:  # the channel is another thread's now
            return
        self._drop_ended(self._channel.wait(0))
        if self._stopping.is_set():
            self._stopped.set()
        for _ in range(_MESSAGES_AT_ONCE):
            received = self._receive()
            if isinstance(received, Arrival):
                self._begin(received.client, received.call)
            elif not received:
                return
        self._loop.call_soon(self._on_readable)

    def _connect(self, client: HostedClient) -> None:
        super()._connect(client)
        if self._unwatched and self._asking is None:
            self._asking = self._loop.call_later(_ASK_INTERVAL_S, self._ask)

    def _ask(self) -> None:
        """In place of descriptors that would tell of these clients' ends."""
        self._asking = None
        self._ask_unwatched()
        if self._unwatched:
            self._asking = self._loop.call_later(_ASK_INTERVAL_S, self._ask)

    def _begin(self, client: HostedClient, call: Call) -> None:
        if client.in_progress >= self._max_calls_in_progress:
            error = LocalProtocolError(
                f"{client.in_progress} calls of this client are in progress; the server's max_calls_in_progress is "
                f"{self._max_calls_in_progress}: wait for some of them"
            )
            self._counters.count_call(0.0)
            self._reply(client, self._failure(client, call, error))
            return
        client.in_progress += 1
        task = self._loop.create_task(self._serve_call(client, [call]))
        self._calls.add(task)
        self._counters.in_flight_peak = max(self._counters.in_flight_peak, len(self._calls))
        task.add_done_callback(self._calls.discard)

    async def _serve_call(self, client: HostedClient, box: list[Call]) -> None:
        """Handle a call, taken out of its box so that nothing holds its arguments longer than the handler does."""
        started = time.perf_counter()
        self._current.set(client.reference)  # in this task's own context
        call = box.pop()
        try:
            data = client.protocol.reply(call.call_id, await self._result(call))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if self._is_cut(error):
                raise
            data = self._failure(client, call, error)
        finally:
            client.in_progress -= 1
            self._counters.count_call(time.perf_counter() - started)
            del call
        self._reply(client, data)
        del client  # whoever keeps the traceback of a handler's error keeps this frame
        self._loop.call_soon(self._on_readable)  # sending may have taken away what would tell of a request

    async def _result(self, call: Call) -> Any:
        try:
            handler = self._handler(call)
            if inspect.iscoroutinefunction(handler):
                return await _run(handler(*call.arguments, **call.keywords))
            box: list[Any] = [call]
            await asyncio.to_thread(_handle, handler, box)
            result = box.pop()
            return await result if inspect.isawaitable(result) else result
        finally:
            del call

    def _is_cut(self, error: BaseException) -> bool:
        """Whether it is this server or the end of its loop that ends a call, not the handler itself."""
        if isinstance(error, GeneratorExit):  # the handler's own comes while its task runs
            with contextlib.suppress(RuntimeError):
                return asyncio.current_task() not in self._calls
            return True
        return self._cutting and isinstance(error, asyncio.CancelledError)

    async def _drain(self) -> None:
        """Let the calls in progress end; those that take too long are cancelled."""
        deadline = deadline_in(self._drain_timeout_s)
        while self._calls and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._calls, timeout=left_s)  # what had come was begun meanwhile
        if self._calls:
            logger.warning("%d calls were still in progress after %g s", len(self._calls), self._drain_timeout_s)
            self._cut(self._calls)

    def _cut(self, calls: Iterable[asyncio.Task[None]]) -> None:
        """Cancel calls in progress; their callers learn from the goodbye that the server has ended."""
        self._cutting = True
        for task in calls:
            task.cancel()

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


async def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await a handler's coroutine; one that has raised lets go of its arguments, whoever keeps the traceback."""
    frame = getattr(coroutine, "cr_frame", None)
    try:
        return await coroutine
    except BaseException:
        if frame is not None:
            frame.clear()
        raise


def _handle(handler: Callable[..., Any], box: list[Any]) -> None:
    """Run a plain handler in a thread: takes the call out of the box and puts the result in.

    What a thread of an executor was given, and what it returns, it may hold for a moment longer than it takes to
    answer; and who has the reply counts on the room that both took.
    """
    call: Call = box.pop()
    box.append(handler(*call.arguments, **call.keywords))
