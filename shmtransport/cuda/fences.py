"""Points in a stream, and what is to happen once the GPU has reached them.

A fence tells at once whether it was reached. A watcher asks again and again, in a thread that ends when there is
nothing to ask any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..errors import DeviceError
from ..memory.send_arena import DeviceCopy
from .driver import errors_in_words

logger = logging.getLogger("shmtransport")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 20e-6, 200e-6  # between two looks: a copy of a MiB takes about 50 µs
_LINGER_S = 1.0  # how long the thread stays for the next fence
_CLOSE_TIMEOUT_S = 1.0


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
    """Does what is to be done behind fences.

    Args:
        current: Makes the GPU's context that of the thread, for a while.
    """

    def __init__(self, current: Callable[[], AbstractContextManager[None]]) -> None:
        self._current = current
        self._waiting: deque[tuple[DeviceCopy, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._linger_s = _LINGER_S
        self._thread: threading.Thread | None = None

    def when_done(self, fence: DeviceCopy, action: Callable[[], None]) -> None:
        """Call ``action`` once the fence was reached, or the GPU has failed; at once if that is so already."""
        if self._is_over(fence):
            action()
            return
        with self._changed:
            self._waiting.append((fence, action))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="shmtransport fences", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Wait for what can still be reached, for a short time; a GPU that hangs keeps what it has."""
        with self._changed:
            self._linger_s = 0.0
            thread = self._thread
            self._changed.notify()
        if thread is not None:
            thread.join(_CLOSE_TIMEOUT_S)

    def _watch(self) -> None:
        with self._current():
            pause_s = FIRST_PAUSE_S
            while waiting := self._all_waiting():
                due = [one for one in waiting if self._is_over(one[0])]
                for one in due:
                    self._waiting.remove(one)
                    one[1]()
                pause_s = FIRST_PAUSE_S if due else min(2 * pause_s, LONGEST_PAUSE_S)
                due = waiting = []
                time.sleep(pause_s)

    def _all_waiting(self) -> list[tuple[DeviceCopy, Callable[[], None]]]:
        """What waits now, or soon; if there is nothing, this thread is to end."""
        with self._changed:
            if not self._waiting and self._linger_s:
                self._changed.wait(self._linger_s)
            if not self._waiting:
                self._thread = None
            return list(self._waiting)

    def _is_over(self, fence: DeviceCopy) -> bool:
        try:
            return fence.done()
        except DeviceError as error:
            logger.warning("%s", error)
            return True
