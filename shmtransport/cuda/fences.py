"""Points in a stream, and what is to happen once the GPU has reached them.

A fence tells at once whether it was reached. A watcher asks again and again, for all that is to be done behind fences.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeAlias

from ..errors import DeviceError
from ..memory.send_arena import DeviceCopy
from .driver import errors_in_words

logger = logging.getLogger("shmtransport")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 2e-3  # between two looks: a copy of a MiB takes about 50 µs
_LINGER_PAUSE_S = 0.1
_FLUSH_TIMEOUT_S = 1.0


class Fence:
    """A point in a stream.

    Args:
        event: cuda-core's event, recorded there.
        finish: What the processor has left to do before what lies before the fence is complete. It runs once.
        keep: What must live until then.
    """

    def __init__(self, event: Any, finish: Callable[[], None] | None = None, keep: Any = None) -> None:
        self._event = event
        self._finish = finish
        self._keep = keep
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Return whether the stream has passed this point, without waiting.

        Raises:
            DeviceError: The GPU has failed. Afterwards the fence counts as passed: nothing more happens there.
        """
        with self._lock:
            if self._event is None:
                return True
            try:
                with errors_in_words():
                    if not self._event.is_done:
                        return False
                if self._finish is not None:
                    self._finish()
            except DeviceError:
                self._forget()
                raise
            self._forget()
            return True

    def _forget(self) -> None:
        self._event = self._finish = self._keep = None


class FenceWatcher:
    """Does what is to be done behind fences, in a thread that sleeps while there is nothing to do.

    Args:
        current: Makes the GPU's context that of the thread, for a while.
    """

    def __init__(self, current: Callable[[], AbstractContextManager[None]]) -> None:
        # A SimpleQueue, since a tensor may die, in a garbage collection, in the middle of this thread's own ``put``.
        self._queue: SimpleQueue[_Told] = SimpleQueue()
        arguments = (self._queue, current)
        threading.Thread(target=_watch, args=arguments, name="shmtransport fences", daemon=True).start()
        ending = weakref.finalize(self, self._queue.put, None)
        ending.atexit = False  # what is still in use then is the driver's to free, in a process that ends

    def when_done(self, fence: DeviceCopy, action: Callable[[], None]) -> None:
        """Call ``action`` once the fence was reached, or the GPU has failed; at once if that is so already."""
        if _is_over(fence):
            action()
        else:
            self._queue.put((fence, action))

    def later(self, action: Callable[[], None]) -> None:
        """Call ``action`` soon, in the watcher's thread: for what must not run in the middle of something else."""
        self._queue.put((Fence(None), action))

    def linger(self, is_over: Callable[[], bool], keep: Any) -> None:
        """Keep something until ``is_over``, which is asked a few times a second; ``flush`` does not wait for it."""
        self._queue.put(_Lingering(is_over, keep))

    def flush(self) -> None:
        """Wait until nothing is left to do, for a short time: a GPU that hangs keeps what it has."""
        idle = threading.Event()
        self._queue.put(idle)
        idle.wait(_FLUSH_TIMEOUT_S)


class _Lingering(NamedTuple):
    """What is kept until it is over."""

    is_over: Callable[[], bool]
    keep: Any


_Task: TypeAlias = "tuple[DeviceCopy, Callable[[], None]]"
_Told: TypeAlias = "_Task | _Lingering | threading.Event | None"


def _watch(queue: SimpleQueue[_Told], current: Callable[[], AbstractContextManager[None]]) -> None:
    """What the thread does, until it is told None and nothing is left to do."""
    watch = _Watch(queue)
    with contextlib.suppress(DeviceError), current():
        while watch.goes_on:
            watch.step()


class _Watch:
    """What the thread waits for. It refers to no watcher, which would never be dropped otherwise."""

    def __init__(self, queue: SimpleQueue[_Told]) -> None:
        self._queue = queue
        self._waiting: list[_Task] = []
        self._lingering: list[_Lingering] = []
        self._flushing: list[threading.Event] = []
        self._is_last = False
        self._pause_s = _FIRST_PAUSE_S

    @property
    def goes_on(self) -> bool:
        """Whether more may come, or something is left to do."""
        return bool(self._waiting or self._lingering or not self._is_last)

    def step(self) -> None:
        """Take in what comes within a pause, and do what is due."""
        with contextlib.suppress(Empty):
            self._take(self._queue.get(timeout=self._timeout_s()))
        due = [task for task in self._waiting if _is_over(task[0])]
        self._waiting = [task for task in self._waiting if task not in due]
        self._pause_s = _FIRST_PAUSE_S if due else min(2 * self._pause_s, _LONGEST_PAUSE_S)
        while due:
            due.pop()[1]()
        if not self._waiting:
            self._lingering = [one for one in self._lingering if not one.is_over()]
            while self._flushing:
                self._flushing.pop().set()

    def _timeout_s(self) -> float | None:
        if self._waiting:
            return self._pause_s
        return _LINGER_PAUSE_S if self._lingering else None

    def _take(self, told: _Told) -> None:
        if told is None:
            self._is_last = True
        elif isinstance(told, threading.Event):
            self._flushing.append(told)
        elif isinstance(told, _Lingering):
            self._lingering.append(told)
        else:
            self._waiting.append(told)
            self._pause_s = _FIRST_PAUSE_S


def _is_over(fence: DeviceCopy) -> bool:
    try:
        return fence.done()
    except DeviceError as error:
        logger.warning("%s", error)
        return True
