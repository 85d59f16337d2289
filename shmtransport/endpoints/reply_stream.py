"""What a user holds of a streaming call: an iterator over its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol

from ..errors import CallCancelled, TransportError
from ..memory.forks import BoundToProcess
from ..protocol.in_flight import CallInFlight, StreamInFlight
from ..protocol.uncompiled import uncompiled

READ_AHEAD = 8
"""How many parts a server may make before they are taken, unless the caller says otherwise."""


class Progress(Protocol):
    """What a client does for its streams."""

    def wait_for(self, call: CallInFlight, timeout_s: float | None) -> None:
        """Wait until a part or the end has arrived, or raise ``CallTimeout``."""

    def take_part(self, stream: StreamInFlight) -> Any:
        """Return a part that has arrived, or raise what the stream has ended with."""

    def give_up(self, call: CallInFlight, error: TransportError) -> bool:
        """End a call with an error, and tell the server; False if it has ended already."""


@uncompiled
class ReplyStream(BoundToProcess, Iterator[Any]):
    """The parts of a streaming call, as they arrive; made by ``Client.stream``.

    A part's tensors are borrowed, as those of any result. One thread at a time may iterate.
    """

    def __init__(self, call: StreamInFlight, client: Progress, timeout_s: float) -> None:
        self._call = call
        self._client = client
        self._timeout_s = timeout_s
        self._is_open = True

    @property
    def method(self) -> str:
        """The name of the method that was called."""
        return self._call.method

    def __next__(self) -> Any:
        """Wait for the next part, for up to ``timeout_s`` seconds.

        Raises:
            StopIteration: The generator has ended, or this stream was closed.
            CallTimeout: No part in time; the stream stays open, and may be asked again.
            RemoteError: The generator raised; the parts before that have been returned.
            PeerDied, PeerProtocolError, Closed: The connection ended first.
        """
        if not self._is_open:
            raise StopIteration
        if not self._call.ready:
            self._client.wait_for(self._call, self._timeout_s)
        try:
            return self._client.take_part(self._call)
        except BaseException:
            self._is_open = False
            raise
        finally:
            del self  # an error's traceback keeps this frame

    def close(self) -> None:
        """End the generator, and forget the parts that were not taken. A second call does nothing."""
        self._is_open = False
        self._client.give_up(self._call, CallCancelled(f"the stream of {self.method!r} was closed"))
        self._call.drop_parts()

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        """Close a stream that was dropped, as Python does with a generator."""
        with contextlib.suppress(AttributeError, TransportError):  # it was not made, or the connection has ended
            if not self._call.ended:
                self.close()

    def __repr__(self) -> str:
        state = "open" if self._is_open and not self._call.ended else "ended"
        return f"<ReplyStream {self.method!r}: {state}>"
