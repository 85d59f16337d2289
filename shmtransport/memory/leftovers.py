"""Lists the segments that have a name in /dev/shm, and removes those that dead processes have left.

A segment has a name only while a connection is being made. So what is found here is either about to vanish, or left by
a process that was killed at the wrong moment.

Rules that it keeps:

* nothing that a living process owns is removed, even in another container (see ``named_object``);
* nothing of another user is removed, even for root; a file that only looks like a segment (a link, a directory) is not
  opened.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from dataclasses import dataclass

from ..units import size_text
from .named_object import DIRECTORY
from .segment import SEGMENTS

logger = logging.getLogger("shmtransport")

_BLOCK_BYTES = 512  # the unit of st_blocks


@dataclass(frozen=True)
class SharedObject:
    """A segment that has a name.

    ``nbytes`` is the memory that it takes now, ``age_s`` the seconds since it was made. ``owner_pid`` is the owner's
    process id, 0 or negative if it can't be seen from here, None if it is dead.
    """

    name: str
    nbytes: int
    owner_pid: int | None
    age_s: float

    @property
    def dead(self) -> bool:
        return self.owner_pid is None


def list_all() -> list[SharedObject]:
    """All segments of this user that have a name, oldest first."""
    found = [_look(name) for name in SEGMENTS.names()]
    return sorted((one for one in found if one is not None), key=lambda one: -one.age_s)


def remove_dead() -> list[SharedObject]:
    """Remove what dead processes of this user have left; what was removed."""
    return [one for one in list_all() if one.dead and SEGMENTS.remove_if_dead(one.name)]


def sweep() -> None:
    """Remove what dead processes of this user have left, and log what was removed; never fails."""
    try:
        removed = remove_dead()
    except Exception:
        logger.info("what dead processes may have left in %s could not be removed", DIRECTORY, exc_info=True)
        return
    if removed:
        logger.info("removed from %s: %s", DIRECTORY, in_words(removed))


def in_words(objects: list[SharedObject]) -> str:
    """Count them and their memory in words, for example "2 segments (64.1 MiB) of dead processes"."""
    count = len(objects)
    taken = size_text(sum(one.nbytes for one in objects))
    return f"{count} segment{'s' if count > 1 else ''} ({taken}) of dead processes" if objects else "nothing"


def _look(name: str) -> SharedObject | None:
    """Describe one segment; None if it is gone, another user's, or no plain file."""
    try:
        status = os.lstat(SEGMENTS.file(name))
        if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
            return None
        age_s = max(time.time() - status.st_mtime, 0.0)
        return SharedObject(name, status.st_blocks * _BLOCK_BYTES, SEGMENTS.owner_of(name), age_s)
    except OSError:
        return None
