"""Maps a segment so that a peer that cuts its file short can't end this process.

Behind the end of a file that was cut, a mapping raises SIGBUS. The compiled core, if there is one, whichever twin is in
use, maps the file, puts zeros there instead, and tells here that this has happened: see ``core/native/guards.h``. Its
mapping lives as long as the last tensor over it, even beyond the interpreter.
``SHMTRANSPORT_SIGBUS=off`` in the environment leaves the process's SIGBUS handler as it is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

try:
    from ..core._native import Mapping
except ImportError:
    _COMPILED = False
else:
    _COMPILED = True

SWITCH = "SHMTRANSPORT_SIGBUS"


def guards_are_on() -> bool:
    """Return whether mappings are guarded in this process."""
    return _COMPILED and os.environ.get(SWITCH, "") != "off"


def map_file(fd: int, nbytes: int) -> memoryview:
    """Map a file's first bytes, to read and to write; the mapping lives as long as any view of this one.

    Raises:
        OSError: It can't be mapped.
        ValueError: The file is smaller.
    """
    if not _COMPILED:
        return memoryview(mmap.mmap(fd, nbytes))
    mapping = Mapping(fd, nbytes, guards_are_on())
    memory = (ctypes.c_ubyte * nbytes).from_address(mapping.address)
    memory.mapping = mapping  # type: ignore[attr-defined]  # lives as long as what looks into it
    return memoryview(memory).cast("B")


def mapping_of(memory: memoryview) -> Any:
    """The mapping that a view looks into; of another view's memory, what owns that."""
    return getattr(memory.obj, "mapping", memory.obj)


def was_cut(memory: memoryview) -> bool:
    """Whether something behind the end of a file that was cut short has been read or written; False if not known."""
    return getattr(mapping_of(memory), "was_cut", False)
