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
from typing import Any, TypeAlias

from ..errors import DeviceError
from ..memory.send_arena import DeviceCopy
from .driver import errors_in_words

logger = logging.getLogger("shmtransport")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 20e-6, 200e-6  # between two looks: a copy of a MiB takes about 50 µs
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
        self._queue: SimpleQueue[_Task | threading.Event | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_watch, args=(self._queue, current), name="shmtransport fences", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._queue.put, None)

    def when_done(self, fence: DeviceCopy, action: Callable[[], None]) -> None:
        """Call ``action`` once the fence was reached, or the GPU has failed; at once if that is so already."""
        if _is_over(fence):
            action()
        else:
            self._queue.put((fence, action))

    def flush(self) -> None:
        """Wait until nothing is left to do, for a short time: a GPU that hangs keeps what it has."""
        idle = threading.Event()
        self._queue.put(idle)
        idle.wait(_FLUSH_TIMEOUT_S)


_Task: TypeAlias = "tuple[DeviceCopy, Callable[[], None]]"


def _watch(
    queue: SimpleQueue[_Task | threading.Event | None], current: Callable[[], AbstractContextManager[None]]
) -> None:
    """Until None comes, look at fences and do what is due; set an event that comes once there is nothing to do."""
    waiting: list[_Task] = []
    flushing: list[threading.Event] = []
    pause_s = FIRST_PAUSE_S
    with contextlib.suppress(DeviceError), current():
        while True:
            with contextlib.suppress(Empty):
                told = queue.get(timeout=pause_s if waiting else None)
                if told is None:
                    return
                if isinstance(told, threading.Event):
                    flushing.append(told)
                else:
                    waiting.append(told)
                    pause_s = FIRST_PAUSE_S
                del told
            due = [task for task in waiting if _is_over(task[0])]
            waiting = [task for task in waiting if task not in due]
            pause_s = FIRST_PAUSE_S if due else min(2 * pause_s, LONGEST_PAUSE_S)
            while due:
                due.pop()[1]()
            while flushing and not waiting:
                flushing.pop().set()


def _is_over(fence: DeviceCopy) -> bool:
    try:
        return fence.done()
    except DeviceError as error:
        logger.warning("%s", error)
        return True
