"""The user's handle on a call in flight, and what waits for several of them at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from ..errors import CallCancelled
from ..memory.forks import BoundToProcess
from ..protocol.in_flight import CallInFlight
from ..protocol.uncompiled import uncompiled


class Progress(Protocol):
    """What a client does for its calls in flight."""

    def receive_for(self, call: CallInFlight) -> None:
        """Receive what has arrived, without waiting."""

    def wait_for(self, call: CallInFlight, timeout_s: float | None) -> None:
        """Wait until the call has ended, or raise ``CallTimeout``."""

    def give_up(self, call: CallInFlight, error: CallCancelled) -> bool:
        """End a call with an error; False if it has ended already."""

    def call_back(self, call: CallInFlight, callback: Callable[[], object]) -> None:
        """Have ``callback`` called once the call has ended."""


@uncompiled
class PendingReply(BoundToProcess):
    """A call in flight; made by ``Client.submit``.

    It has the methods of ``concurrent.futures.Future``, and can be awaited in asyncio. Every method makes progress: a
    loop that asks ``done()`` ends once the reply has arrived.
    """

    def __init__(self, call: CallInFlight, client: Progress) -> None:
        self._call = call
        self._client = client

    @property
    def method(self) -> str:
        """The name of the method that was called."""
        return self._call.method

    def done(self) -> bool:
        """Return whether the call has ended: with a result, with an error, or by being cancelled."""
        if not self._call.ended:
            self._client.receive_for(self._call)
        return self._call.ended

    def cancelled(self) -> bool:
        """Return whether ``cancel`` ended the call."""
        return isinstance(self._call.error, CallCancelled)

    def running(self) -> bool:
        """Return whether the call has not ended yet; like every call here, it was sent when it was made."""
        return not self.done()

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the call's result and return it.

        A result with borrowed tensors is handed out once, so that this object keeps no room of the reply arena; any
        other may be asked for again.

        Args:
            timeout_s: How long to wait, in seconds; None for the client's ``timeout_s``.

        Raises:
            CallTimeout: No reply in time. The call stays in flight: ask again, or ``cancel`` it.
            CallCancelled: ``cancel`` ended the call.
            RemoteError: The handler raised.
            LocalProtocolError: The result was handed out already.
            PeerDied, PeerProtocolError, Closed: The connection ended first.
        """
        if not self._call.ended:
            self._client.wait_for(self._call, timeout_s)
        try:
            return self._call.take_result()
        finally:
            del self  # an error's traceback keeps this frame

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the call to end; return its error, or None if it has a result.

        Args:
            timeout_s: As for ``result``.

        Raises:
            CallTimeout: No reply in time.
            CallCancelled: ``cancel`` ended the call.
        """
        if not self._call.ended:
            self._client.wait_for(self._call, timeout_s)
        if self.cancelled():
            self._call.take_result()
        return self._call.error

    def cancel(self) -> bool:
        """Give the call up; return False if it has ended already.

        The server is told: it leaves out what it has not begun, cancels a coroutine, and sends no reply. What one that
        is on its way holds is released.
        """
        return not self.done() and self._client.give_up(
            self._call, CallCancelled(f"the call of {self.method!r} was cancelled")
        )

    def add_done_callback(self, callback: Callable[[PendingReply], object]) -> None:
        """Have ``callback(self)`` called once the call has ended; at once if it has.

        It runs in whichever thread received the reply; the client starts a thread to receive while no other does.
        What it raises is logged.
        """
        self._client.call_back(self._call, lambda: callback(self))

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait in an event loop; then as ``result``."""
        yield from asyncio.wrap_future(_end_of(self)).__await__()
        return self.result()

    def __repr__(self) -> str:
        call = self._call
        state = "in flight" if not call.ended else "done" if call.error is None else type(call.error).__name__
        return f"<PendingReply {call.method!r}: {state}>"


class Waited(NamedTuple):
    """What ``wait`` returns."""

    done: set[PendingReply]
    not_done: set[PendingReply]


def _end_of(pending: PendingReply) -> concurrent.futures.Future[None]:
    """A future that ends with the call, and holds neither result nor error: what waits for it may keep it longer."""
    end: concurrent.futures.Future[None] = concurrent.futures.Future()
    end.set_running_or_notify_cancel()
    pending.add_done_callback(lambda _pending: end.set_result(None))
    return end


def wait(
    pending: Iterable[PendingReply],
    timeout_s: float | None = None,
    return_when: str = concurrent.futures.ALL_COMPLETED,
) -> Waited:
    """Wait for several calls, of one or more clients, as ``concurrent.futures.wait`` does.

    Args:
        pending: The calls.
        timeout_s: How long to wait at most, in seconds; None for no limit.
        return_when: ``concurrent.futures``' ALL_COMPLETED, FIRST_COMPLETED or FIRST_EXCEPTION.

    Returns:
        The calls that have ended, and the others.
    """
    calls = set(pending)
    if return_when == concurrent.futures.FIRST_EXCEPTION:
        return _until_first_error(calls, timeout_s)
    ends = {_end_of(one): one for one in calls}
    ended, _ = concurrent.futures.wait(ends, timeout_s, return_when)
    done = {ends[end] for end in ended}
    return Waited(done, calls - done)


def _until_first_error(calls: set[PendingReply], timeout_s: float | None) -> Waited:
    done: set[PendingReply] = set()
    with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):  # two classes before Python 3.11
        for one in as_completed(calls, timeout_s):
            done.add(one)
            if one.cancelled() or one.exception() is not None:
                break
    return Waited(done, calls - done)


def as_completed(pending: Iterable[PendingReply], timeout_s: float | None = None) -> Iterator[PendingReply]:
    """Yield calls as they end, as ``concurrent.futures.as_completed`` does.

    Args:
        pending: The calls, of one or more clients.
        timeout_s: How long to wait for all of them, in seconds; None for no limit.

    Raises:
        TimeoutError: The time is up before all have ended.
    """
    ends = {_end_of(one): one for one in set(pending)}
    for end in concurrent.futures.as_completed(list(ends), timeout_s):
        yield ends.pop(end)
