"""Calls in flight whose results are awaited in an event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from ..protocol.in_flight import CallInFlight, StreamInFlight


class _Awaited(CallInFlight):
    """A call whose end completes a future."""

    __slots__ = ()
    arrived: asyncio.Future[None] | None
    """What is awaited now. It holds neither result nor error: the loop keeps it longer."""

    def succeed(self, result: Any, *, has_tensors: bool) -> None:
        super().succeed(result, has_tensors=has_tensors)
        self.wake()

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self.wake()

    def wake(self) -> None:
        if self.arrived is not None and not self.arrived.done():
            self.arrived.set_result(None)


class AwaitedCall(_Awaited):
    """A call with one result.

    Args:
        method: The name of the method.
        arrived: Done once the call has ended.
    """

    __slots__ = ("arrived",)

    def __init__(self, method: str, arrived: asyncio.Future[None]) -> None:
        super().__init__(method)
        self.arrived: asyncio.Future[None] = arrived


class AwaitedStream(_Awaited, StreamInFlight):
    """A call that is answered part by part."""

    __slots__ = ("arrived",)

    def __init__(self, method: str, window: int) -> None:
        StreamInFlight.__init__(self, method, window)
        self.arrived = None

    def add(self, part: Any) -> None:
        super().add(part)
        self.wake()

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait for a part or the end, for up to ``timeout_s`` seconds; return whether there is one."""
        if not self.ready:
            self.arrived = asyncio.get_running_loop().create_future()
            await asyncio.wait((self.arrived,), timeout=timeout_s)
            self.arrived = None
        return self.ready
