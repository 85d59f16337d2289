"""A handler that yields its results one by one, at the blocking server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import LocalProtocolError
from ..text import printable
from .server_connection import ServerConnection

MAX_STREAMS = 1024
"""The most streams of one client that a blocking server has in progress."""


class ServerStream:
    """A streaming call in progress.

    Args:
        connection: The client's.
        call_id: The call.
        method: The name of its method.
        parts: What the handler returned.
        credit: How many parts may be sent before the client asks for more.

    Raises:
        LocalProtocolError: The handler returned no iterator.
    """

    def __init__(self, connection: ServerConnection, call_id: int, method: str, parts: Any, credit: int) -> None:
        if not isinstance(parts, Iterator):
            raise not_a_stream(method, parts)
        self.connection = connection
        self.call_id = call_id
        self.method = method
        self.credit = credit
        self.is_queued = False
        """Whether it has a turn coming, or is running."""
        self.waits_for_room = False
        self.cancelled = False
        self.ended = False
        self._parts = parts

    @property
    def wants_turn(self) -> bool:
        """Whether it can go on, and has no turn coming yet."""
        return not (self.ended or self.is_queued) and (self.cancelled or (self.credit > 0 and not self.waits_for_room))

    def take_turn(self) -> Any:
        """Run the handler up to its next part, and return that.

        Raises:
            StopIteration: The handler has ended.
            BaseException: The handler raised it.
        """
        try:
            part = next(self._parts)
        except BaseException:
            self.ended = True
            raise
        self.credit -= 1
        return part

    def close(self) -> None:
        """End the handler where it stands; what its ``finally`` clauses raise comes out here."""
        self.ended = True
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()


def check_number(connection: ServerConnection) -> None:
    """Check that one more stream of a client may begin.

    Raises:
        LocalProtocolError: As many are in progress as may be.
    """
    if len(connection.streams) >= MAX_STREAMS:
        raise LocalProtocolError(
            f"{len(connection.streams)} streams of this client are in progress, as many as may: wait for some of them"
        )


def not_a_stream(method: str, result: Any) -> LocalProtocolError:
    """Make the error of a streaming call whose handler is no generator."""
    return LocalProtocolError(
        f"'{printable(method)}' returned a {type(result).__name__}, not the parts of a stream: use call()"
    )
