"""What one call of a client is known to be at: sent, ended, with which result."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any


class CallState:
    """The state of a call, which its owner changes.

    Args:
        method: the name of the method.
    """

    __slots__ = (
        "call_id",
        "callbacks",
        "data",
        "ended",
        "error",
        "generation",
        "handed_out",
        "has_tensors",
        "method",
        "ready",
        "result",
        "submitted",
    )

    def __init__(self, method: str) -> None:
        self.method = method
        self.submitted = perf_counter()
        self.call_id = -1
        self.generation = 0
        """The number of the client's connection that the call was sent over."""
        self.data: bytes | None = None
        """The bytes of its request, until they are sent."""
        self.ready = False
        """Whether there is something to take."""
        self.ended = False
        self.error: BaseException | None = None
        self.callbacks: list[Callable[[], object]] | None = None
        """What to call when the call ends; None if nothing."""
        self.result: Any = None
        self.has_tensors = False
        """Whether the result has tensors: it is handed out once."""
        self.handed_out = False
