"""One GPU: its primary context, which torch uses too, and what belongs to no single connection."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import DeviceError
from .driver import ask, errors_in_words, libraries
from .fences import Fence, FenceWatcher
from .staging import Staging

logger = logging.getLogger("shmtransport")


class Gpu:
    """The GPU of one server.

    Args:
        ordinal: Its number among those that this process sees.

    Raises:
        DeviceError: There is none of this number, or no driver.
    """

    def __init__(self, ordinal: int) -> None:
        count = ask("cuDeviceGetCount")
        if ordinal >= count:
            raise DeviceError(f"cuda:{ordinal} is not there: this process sees {count} GPUs (CUDA_VISIBLE_DEVICES)")
        self.ordinal = ordinal
        device = ask("cuDeviceGet", ordinal)
        context = ask("cuDevicePrimaryCtxRetain", device)
        self.current = functools.partial(_current, context)
        """Makes this GPU's context the current one of a thread, for the time of a ``with`` block."""
        with self.current(), errors_in_words():
            self.memory = self._core_device().memory_resource
        """Memory in the order of streams, for tensors that no other library makes."""
        self.watcher = FenceWatcher(self.current)
        self.staging = Staging(self.current)
        self.uuid = bytes(ask("cuDeviceGetUuid", device).bytes)
        """Which GPU it is, in all processes."""
        self.pinned_copies = self.bounced_copies = 0
        """Copies straight from or to an arena, and those through a buffer."""
        self._counting = threading.Lock()
        self._warned = False

    def new_stream(self) -> Any:
        """Make a stream that the default stream does not wait for."""
        options = libraries().core.StreamOptions(nonblocking=True)
        with self.current(), errors_in_words():
            return self._core_device().create_stream(options=options)

    def wait_for(self, handle: int, stream: Any) -> None:
        """Let a stream wait for what another one, known by its handle, has begun."""
        with errors_in_words():
            stream.wait(libraries().core.Stream.from_handle(handle))

    def _core_device(self) -> Any:
        """cuda-core's object for this GPU, ready for use in this thread."""
        device = libraries().core.Device(self.ordinal)
        device.set_current()
        return device

    def warn_of_bounces(self, error: DeviceError) -> None:
        """Warn once that arenas can't be pinned."""
        with self._counting:
            warned, self._warned = self._warned, True
        if not warned:
            logger.warning("arenas can't be pinned for cuda:%d, so copies go through a buffer: %s", self.ordinal, error)

    def count_copy(self, *, pinned: bool) -> None:
        """Count a copy between an arena and the GPU."""
        with self._counting:
            if pinned:
                self.pinned_copies += 1
            else:
                self.bounced_copies += 1

    def fence(self, stream: Any, **then: Any) -> Fence:
        """Mark the point that a stream has come to."""
        with errors_in_words():
            return Fence(stream.record(), **then)

    def close(self) -> None:
        """Give back what is not in use by the GPU; its context stays, as torch's does."""
        self.watcher.flush()
        self.staging.close()


@contextlib.contextmanager
def _current(context: Any) -> Iterator[None]:
    ask("cuCtxPushCurrent", context)
    try:
        yield
    except BaseException:
        with contextlib.suppress(DeviceError):  # the first error is the one to tell
            ask("cuCtxPopCurrent")
        raise
    ask("cuCtxPopCurrent")
