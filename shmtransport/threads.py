"""Threads that an event loop needs for what takes a while."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_a_thread(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Run a function in a thread of its own: all those of the loop's executor may be busy, with handlers say."""
    executor = ThreadPoolExecutor(1, "shmtransport")
    try:
        return executor.submit(function, *arguments)
    finally:
        executor.shutdown(wait=False)
