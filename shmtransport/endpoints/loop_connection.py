"""A client's connection that an event loop reads from, and how it is given back on other threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from .client_connection import ClientConnection, Connecting


class LoopConnection(ClientConnection):
    """A connection that an event loop reads from; ``closing`` completes when it has been closed."""

    def __init__(self, connecting: Connecting, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(connecting)
        self.loop = loop
        self.closing: Future[None] | None = None
        self.untold: deque[bytes] = deque()
        """What the server is to be told about calls that were sent before, once there is room."""


def release_in(loop: asyncio.AbstractEventLoop, descriptors: Sequence[int | None], release: Callable[[], None]) -> None:
    """Give back what a dropped client held, in its loop if that still runs; may be called on any thread."""

    def remove_and_release() -> None:
        for descriptor in descriptors:
            if descriptor is not None:
                loop.remove_reader(descriptor)
        release()

    try:
        loop.call_soon_threadsafe(remove_and_release)
    except RuntimeError:  # the loop is closed
        release()


def close_unwanted(opening: Future[LoopConnection]) -> None:
    """Close a connection that was made although connecting was cancelled; runs in the thread that connected."""
    if not opening.cancelled() and opening.exception() is None:
        connection = opening.result()
        connection.say_goodbye("connecting was cancelled")
        connection.close(flush=True)
