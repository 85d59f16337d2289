"""Results that wait until their client has released enough of its reply arena.

A client that keeps many results while it asks for more delays its own replies, and no other client's. A release is a
plain store that wakes no one, so the server tries again after pauses. It gives a result up when its client cancels the
call, as one does whose time is up, or has gone.

Room is given in the order in which the results were made: a client that waits for its oldest call must not wait for
room that later results have taken. While what waits is as large as the arena, or as many results as may wait, a
``Server`` handles no more calls of the client; an ``AsyncServer`` makes no more parts of its streams, and the calls in
progress are bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ..core import Counters
from ..errors import ArenaFull
from ..memory.plain import is_on_device
from ..memory.send_arena import FIRST_PAUSE_S, LONGEST_PAUSE_S, Unfinished
from .server_connection import ServerConnection

LONGEST_DEVICE_PAUSE_S = 200e-6  # between two looks at a copy by the GPU


def _tensors(result: Any) -> Iterator[Any]:
    """Iterate over all tensors and arrays in a result."""
    if isinstance(result, (torch.Tensor, np.ndarray)) or is_on_device(result):
        yield result
    elif isinstance(result, (list, tuple, dict)):
        for one in result.values() if isinstance(result, dict) else result:
            yield from _tensors(one)


def _needs_room(connection: ServerConnection, result: Any) -> bool:
    """Whether something in a result must be copied into the arena. What ``empty`` has lent is there already.

    Such a result must not wait for an older one, which may wait for the room that it takes.
    """
    has_lent = connection.memory.send_arena.has_lent
    return any(one.nbytes > 0 and not (isinstance(one, torch.Tensor) and has_lent(one)) for one in _tensors(result))


class Deferred:
    """A result that can't be sent yet: there was no room for it, or a GPU is still copying it in.

    Args:
        connection: The client's.
        call_id: The call.
        result: What its handler returned, or a part of its stream.
        is_part: Whether it is that.
        encoded: What it was made into, if there was room.
    """

    def __init__(
        self, connection: ServerConnection, call_id: int, result: Any, is_part: bool, encoded: _Encoded | None
    ) -> None:
        self.connection = connection
        self.call_id = call_id
        self._nbytes = sum(int(one.nbytes) for one in _tensors(result))
        self._result = result if encoded is None else None
        self._is_part = is_part
        self._encoded = encoded
        self._waited_for_room = encoded is None
        self._since = time.monotonic()

    @property
    def waits_for_room(self) -> bool:
        """Whether it has no room yet."""
        return self._encoded is None

    def encode(self) -> bytes | None:
        """Return the bytes of the reply, once; None while there is no room, others come first, or a GPU copies.

        Raises:
            ArenaFull: There is no room although the client holds nothing.
            TransportError: The result can't be sent.
        """
        if self._encoded is None:
            if self.connection.deferred[0] is not self:
                return None
            self._encoded = _encode(self.connection, self.call_id, self._result, self._is_part)
            if self._encoded is None:
                return None
            self._result = None
        if not self._encoded.is_ready():
            return None
        data, self._encoded = self._encoded.data, None
        return data

    def begin(self, counters: Counters) -> None:
        """Begin to wait."""
        self.connection.deferred.append(self)
        self.connection.deferred_bytes += self._nbytes
        if self._waited_for_room:
            counters.count_stall()

    def end(self, counters: Counters) -> None:
        """The wait is over, whatever became of the result."""
        self.connection.deferred.remove(self)
        self.connection.deferred_bytes -= self._nbytes
        if self._waited_for_room:
            counters.count_stalled(time.monotonic() - self._since)
        self.withdraw()

    def withdraw(self) -> None:
        """Give back the room that it has, unless it was sent."""
        if self._encoded is not None:
            self._encoded.withdraw(self.connection)


def encoded(connection: ServerConnection, call_id: int, result: Any, *, is_part: bool = False) -> bytes | Deferred:
    """Return the bytes of a result, or the result itself if it has to wait for room that may come.

    Raises:
        TransportError: The result can't be sent.
    """
    made = None
    if not (any(one.waits_for_room for one in connection.deferred) and _needs_room(connection, result)):
        made = _encode(connection, call_id, result, is_part)
    try:
        if made is not None and made.is_ready():
            return made.data
    except BaseException:
        if made is not None:
            made.withdraw(connection)
        raise
    return Deferred(connection, call_id, result, is_part, made)


class _Encoded(NamedTuple):
    """A reply's bytes, and what must be in the arena before they are sent."""

    data: bytes
    unfinished: Unfinished | None

    def is_ready(self) -> bool:
        """Whether they may be sent."""
        return self.unfinished is None or self.unfinished.done()

    def withdraw(self, connection: ServerConnection) -> None:
        """Give back the room that its tensors have: it is not sent."""
        if self.unfinished is not None:
            connection.memory.send_arena.withdraw_unfinished(self.unfinished)


def _encode(connection: ServerConnection, call_id: int, result: Any, is_part: bool) -> _Encoded | None:
    """Encode a result; return None if there is no room, and some may come."""
    encode = connection.protocol.encode_part if is_part else connection.protocol.encode_reply
    take_unfinished = connection.memory.send_arena.take_unfinished
    try:
        return _Encoded(encode(call_id, result), take_unfinished())
    except ArenaFull:
        if connection.may_have_room:
            return None
    # The client may have released all it held during that try, with the result's first tensors placed around it.
    return _Encoded(encode(call_id, result), take_unfinished())


class DeferredReplies:
    """The deferred results of a blocking server, of all of its clients.

    Args:
        counters: Where waits for room are counted.
        answer: Sends a reply to the client that waits for it.
        fail: Answers a call with an error.
    """

    def __init__(
        self,
        counters: Counters,
        answer: Callable[[Deferred, bytes], None],
        fail: Callable[[Deferred, BaseException], None],
    ) -> None:
        self._counters = counters
        self._answer = answer
        self._fail = fail
        self._waiting: dict[ServerConnection, None] = {}
        """The connections that have such results, in order. A try looks at the oldest of each, however many wait."""
        self._pause_s = FIRST_PAUSE_S

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, deferred: Deferred) -> None:
        """Let a result wait."""
        deferred.begin(self._counters)
        self._waiting[deferred.connection] = None
        self._pause_s = FIRST_PAUSE_S

    def pause_s(self) -> float:
        """Return how long to wait before the next try, a little longer each time."""
        oldest = [connection.deferred[0] for connection in self._waiting if connection.deferred]
        longest_s = LONGEST_PAUSE_S if all(one.waits_for_room for one in oldest) else LONGEST_DEVICE_PAUSE_S
        pause_s, self._pause_s = min(self._pause_s, longest_s), min(2 * self._pause_s, longest_s)
        return pause_s

    def retry(self) -> bool:
        """Send what there is room for now; return whether there was any."""
        answered = False
        for connection in list(self._waiting):
            while connection.deferred and self._try(connection.deferred[0]):
                answered = True
            self._forget_if_none_waits(connection)
        if answered:
            self._pause_s = FIRST_PAUSE_S
        return answered

    def drop(self, connection: ServerConnection, call_id: int | None = None) -> None:
        """Give up a call's result, or all of a connection's."""
        for deferred in [one for one in connection.deferred if call_id in (None, one.call_id)]:
            deferred.end(self._counters)
        self._forget_if_none_waits(connection)

    def _forget_if_none_waits(self, connection: ServerConnection) -> None:
        if not connection.deferred:
            self._waiting.pop(connection, None)

    def _try(self, deferred: Deferred) -> bool:
        """Answer with a connection's oldest result, if there is room now; return whether it waits no longer."""
        try:
            data = deferred.encode()
        except Exception as error:  # noqa: BLE001 - a result may fail at anything; its caller learns of it
            deferred.end(self._counters)
            self._fail(deferred, error)
            return True
        if data is None:
            return False
        deferred.end(self._counters)
        self._answer(deferred, data)
        return True
