"""What the asyncio server knows of a call in progress, and the parts of its stream as an asynchronous iterator."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..protocol.calls import Call
from ..protocol.messages import MAX_WINDOW
from .server_stream import not_a_stream

RunInThread = Callable[..., "asyncio.Future[Any]"]


class Credit:
    """How many parts of a stream may be sent before the client asks for more."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._added: asyncio.Future[None] | None = None

    def add(self, count: int) -> None:
        """Let this many more be sent."""
        self._count = min(self._count + count, MAX_WINDOW)
        if self._added is not None and not self._added.done():
            self._added.set_result(None)

    async def take(self) -> None:
        """Wait until one more may be sent."""
        while self._count == 0:
            self._added = asyncio.get_running_loop().create_future()
            await self._added
        self._count -= 1


class InProgress:
    """A call that has begun and is not answered.

    ``credit`` is None unless it is a stream; ``cancelled`` tells that its client has given it up or has gone.
    """

    def __init__(self, call: Call) -> None:
        self.call_id = call.call_id
        self.method = call.method
        self.is_answered = call.is_answered
        self.credit = Credit(call.window) if call.window else None
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self.waits_for_room = False
        self.over = False
        self.started = time.perf_counter()

    def cancel(self) -> None:
        """End it where it stands, once: a second time would end what the first has begun, such as closing a generator.

        A plain function goes on by itself.
        """
        if not self.cancelled and self.task is not None:
            self.task.cancel()
        self.cancelled = True


class Parts(Protocol):
    """An asynchronous generator, or what behaves like one."""

    async def __anext__(self) -> Any: ...

    async def aclose(self) -> None: ...


def parts_of(method: str, result: Any, run: RunInThread) -> Parts:
    """Return what a handler yields.

    Args:
        method: The name of its method.
        result: What it returned.
        run: Runs a function in a thread.

    Raises:
        LocalProtocolError: It returned no iterator.
    """
    if hasattr(type(result), "__anext__"):
        return result if hasattr(result, "aclose") else _Unclosable(result)
    if isinstance(result, Iterator):
        return _InThreads(result, run)
    raise not_a_stream(method, result)


class _Unclosable:
    """An asynchronous iterator that is no generator, so that nothing needs to be closed."""

    def __init__(self, parts: Any) -> None:
        self.__anext__ = parts.__anext__

    async def aclose(self) -> None:
        pass


class _InThreads:
    """A plain iterator, of which each step runs in a thread."""

    def __init__(self, parts: Iterator[Any], run: RunInThread) -> None:
        self._parts = parts
        self._run = run
        self._lock = threading.Lock()
        self._is_running = False
        self._is_unwanted = False

    async def __anext__(self) -> Any:
        box: list[Any] = []
        self._is_running = True
        step = self._run(self._next, box)
        step.add_done_callback(_retrieve)
        await asyncio.shield(step)  # if the call is cancelled, the step goes on by itself
        if not box:
            raise StopAsyncIteration
        return box.pop()

    async def aclose(self) -> None:
        with self._lock:
            self._is_unwanted = True
            if self._is_running:
                return  # the thread closes it, after the step that it is in
        await asyncio.shield(self._run(self._close))

    def _next(self, box: list[Any]) -> None:
        """Put the next part into a box, since an executor's thread may keep what a function returns for a while."""
        try:
            for part in self._parts:
                box.append(part)
                break
        finally:
            with self._lock:
                self._is_running = False
                unwanted = self._is_unwanted
            if unwanted:
                box.clear()
                self._close()

    def _close(self) -> None:
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()


def _retrieve(step: asyncio.Future[Any]) -> None:
    """Take the exception of a step whose call was cancelled, which asyncio would warn of."""
    if not step.cancelled():
        step.exception()
