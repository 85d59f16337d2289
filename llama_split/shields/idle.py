"""Work for the time in which nothing else is asked for: a thread begins it in a pause, and leaves it when that ends."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

logger = logging.getLogger("llama_split")

PAUSE_S = 0.3
"""How long nothing must have been asked for."""

_END_S = 10.0  # for a step of the work, on a slow machine

Owner = TypeVar("Owner")
GoOn = Callable[[], None]


class _Asked(Exception):
    """Something was asked for in the middle of the work."""


def never_asked() -> None:
    """Go on: for work that nothing ends."""


class IdleWork(Generic[Owner]):
    """Does its owner's work in a thread of its own, whenever there is a pause after something was asked for.

    The thread knows its owner by a weak reference, but while it works. It ends with ``close``, with its owner, and with
    the interpreter. While nothing is asked for and the work is done, it uses no CPU time.

    All methods may be called in a garbage collection, in the thread itself too: they take no lock.

    Args:
        owner: whose work it is.
        work: ``work(owner, go_on)``; it calls ``go_on()`` between its steps, and lets through what that raises.
        what: names the work in the log, if it fails; then the thread ends.
    """

    def __init__(self, owner: Owner, work: Callable[[Owner, GoOn], None], what: str) -> None:
        self._owner = weakref.ref(owner, lambda _: self.close())
        self._work = work
        self._what = what
        self._process = os.getpid()
        self._asked_at = 0.0
        self._is_told = False
        """Whether the thread has been told that something was asked for, and has not begun its work since then."""
        self._is_ended = False
        self._signals: SimpleQueue[None] = SimpleQueue()  # which a garbage collection may put into at any place
        self._thread = threading.Thread(target=self._run, name=f"llama_split: {what}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            logger.warning("%s is given up: %s", what, error)
        else:
            atexit.register(self._finish)  # a thread in the middle of a product must not outlive the interpreter

    def ask(self) -> None:
        """Note that something is asked for: the work is left for now, and begun again after a pause."""
        self._asked_at = time.monotonic()
        if not self._is_told:
            self._is_told = True
            self._signal()

    def close(self) -> None:
        """End the thread, after the step that it is at; this does not wait for it."""
        self._is_ended = True
        self._signal()

    def _signal(self) -> None:
        if os.getpid() == self._process:  # a forked child has no such thread, and may have copied its queue's lock
            self._signals.put(None)

    def _finish(self) -> None:
        self.close()
        self._thread.join(_END_S)

    def _run(self) -> None:
        try:
            while self._wait_for_a_pause():
                with contextlib.suppress(_Asked):
                    self._do()
        except Exception as error:  # noqa: BLE001 - without this work its owner does the same later
            if not self._is_ended:
                logger.warning("%s is given up: %s", self._what, error)
        finally:
            atexit.unregister(self._finish)

    def _wait_for_a_pause(self) -> bool:
        """Wait until something was asked for, and then nothing for a while; return False where this is to end."""
        self._signals.get()
        while not self._is_ended and (left_s := self._asked_at + PAUSE_S - time.monotonic()) > 0:
            with contextlib.suppress(Empty):
                self._signals.get(timeout=left_s)
        self._is_told = False
        return not self._is_ended

    def _do(self) -> None:
        begun = self._asked_at

        def go_on() -> None:
            if self._is_ended or self._asked_at != begun:
                raise _Asked

        owner = self._owner()
        if owner is not None:
            self._work(owner, go_on)
