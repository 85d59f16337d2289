"""A client's calls, from their requests to their results or errors; no I/O."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

from ..core import CallState
from ..errors import LocalProtocolError, PeerProtocolError
from .messages import AnyRequest, More, OneWayRequest, Request, StreamRequest, encode


class CallInFlight(CallState):
    """One call of a client, from its request to its result or error."""

    __slots__ = ()

    def succeed(self, result: Any, *, has_tensors: bool) -> None:
        """End the call with a result."""
        self.result = result
        self.has_tensors = has_tensors
        self.ended = self.ready = True

    def fail(self, error: BaseException) -> None:
        """End the call with an error."""
        self.error = error
        self.ended = self.ready = True

    def wake(self) -> None:
        """Let what awaits this call go on, once the core has ended it."""

    def request(self) -> Callable[..., AnyRequest]:
        """Return what makes this call's message."""
        return Request

    def take_result(self) -> Any:
        """Return the result, or raise the error of a failed call. Forget a result with tensors.

        Raises:
            LocalProtocolError: a result with tensors was handed out before.
            BaseException: the call's error.
        """
        if self.error is not None:
            try:
                raise self.error.with_traceback(None)  # it may have been raised before, by other calls too
            finally:
                del self  # breaks a cycle: the error's traceback holds this frame and the caller's arguments
        if self.handed_out:
            raise LocalProtocolError("a result with tensors is handed out once: keep what result() returned")
        result = self.result
        if self.has_tensors:
            self.result, self.handed_out = None, True
        return result


class OneWayCall(CallInFlight):
    """A call that nothing answers."""

    __slots__ = ()

    def request(self) -> Callable[..., AnyRequest]:
        return OneWayRequest


class StreamInFlight(CallInFlight):
    """A call that is answered part by part.

    Args:
        method: The name of the method.
        window: The most parts that may be here, or on their way, before they are taken.
    """

    __slots__ = ("_parts", "_taken", "window")

    def __init__(self, method: str, window: int) -> None:
        super().__init__(method)
        self.window = window
        self._parts: deque[Any] = deque()
        self._taken = 0
        """How many parts were taken since the server was last told."""

    def request(self) -> Callable[..., AnyRequest]:
        return functools.partial(StreamRequest, window=self.window)

    def add(self, part: Any) -> None:
        """Add a part that has arrived.

        Raises:
            PeerProtocolError: the server was not asked for so many.
        """
        if len(self._parts) + self._taken >= self.window:
            raise PeerProtocolError(f"the server sent more parts of {self.method!r} than the {self.window} it may")
        self._parts.append(part)
        self.ready = True

    def take_part(self) -> Any:
        """Return the next part; what has arrived comes before the stream's end.

        Raises:
            StopIteration: The stream is over.
            BaseException: The call's error.
        """
        if self._parts:
            part = self._parts.popleft()
            self._taken += 1
            self.ready = self.ended or bool(self._parts)
            return part
        self.take_result()
        raise StopIteration

    def drop_parts(self) -> None:
        """Forget the parts that were not taken."""
        self._parts.clear()

    def more(self) -> bytes | None:
        """Return the message that asks for as many parts as were taken; None while these are few."""
        if self.ended or 2 * self._taken < self.window:
            return None
        taken, self._taken = self._taken, 0
        return encode(More(self.call_id, taken))
