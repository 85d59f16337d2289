"""What the asyncio client and server share: threads for slow work, and a limit on each turn."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_called: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[Callable[[], None]]] = weakref.WeakKeyDictionary()
"""What SIGINT and SIGTERM call in each event loop, which itself calls one function only."""

MESSAGES_AT_ONCE = 64
"""How many messages to take before the loop's other work gets its turn."""


def in_a_thread(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Run a function in its own thread, since handlers may occupy the loop's whole executor."""
    executor = ThreadPoolExecutor(1, "shmtransport")
    try:
        return executor.submit(function, *arguments)
    finally:
        executor.shutdown(wait=False)


@contextlib.contextmanager
def called_by_signals(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call a function while the block runs, beside those of other servers in this loop."""
    functions = _called.setdefault(loop, [])

    def call_all() -> None:
        for one in list(functions):
            one()

    if not functions:
        for number in _SIGNALS:
            loop.add_signal_handler(number, call_all)
    functions.append(function)
    try:
        yield
    finally:
        functions.remove(function)
        if not functions:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
