"""Maps a segment so that a peer that cuts its file short can't end this process.

Behind the end of a file that was cut, a mapping raises SIGBUS. The compiled core, if there is one, whichever twin is in
use, puts zeros there instead, and tells here that this has happened: see ``core/native/guards.h``.
``SHMTRANSPORT_SIGBUS=off`` in the environment leaves the process's SIGBUS handler as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

try:
    from ..core._native import guard, unguard, was_cut
except ImportError:
    _COMPILED = False
else:
    _COMPILED = True

SWITCH = "SHMTRANSPORT_SIGBUS"
_NONE = -1


def guards_are_on() -> bool:
    """Return whether mappings are guarded in this process."""
    return _COMPILED and os.environ.get(SWITCH, "") != "off"


class GuardedMap(mmap.mmap):
    """A mapping of a file that another process may cut short; views of it keep it, and its guard, alive."""

    _guard = _NONE  # also of one that could not be made, and is deleted without __init__

    def __init__(self, _fd: int, nbytes: int) -> None:
        if guards_are_on():
            first = ctypes.c_char.from_buffer(self)
            self._guard = guard(ctypes.addressof(first), nbytes)

    @property
    def was_cut(self) -> bool:
        """Whether something behind the end of a file that was cut short has been read or written."""
        return self._guard != _NONE and was_cut(self._guard)

    def __del__(self) -> None:
        """Before the mapping ends: what is mapped there next is none of the guard's business."""
        if self._guard != _NONE:
            with contextlib.suppress(AttributeError, TypeError):  # at the interpreter's end
                unguard(self._guard)
