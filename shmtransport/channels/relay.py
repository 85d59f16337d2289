"""A thread that waits for a bell on behalf of one that waits for descriptors, or vice versa."""

from __future__ import annotations

import threading
from collections.abc import Callable

SLICE_S = 0.5
"""The longest time that one wait for a bell blocks."""


class Relay:
    """A thread that calls ``step`` repeatedly, until ``stop``.

    Args:
        name: the thread's name.
        step: waits once, then wakes the process in the other way.
        interrupt: makes a ``step`` that waits return.

    Raises:
        RuntimeError: the thread can't be started.
    """

    def __init__(self, name: str, step: Callable[[], None], interrupt: Callable[[], None]) -> None:
        self._step = step
        self._interrupt = interrupt
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            self._step()

    def stop(self) -> None:
        self._stopping = True
        self._interrupt()
        if self._thread is not threading.current_thread():  # a garbage collection may stop it from its own thread
            self._thread.join()
