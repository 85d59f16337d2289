"""What this package has in /dev/shm by name: segments and bells, of the living and of the dead.

A segment has a name only while a connection is being made, a client's bell too; a server's bell keeps its name. So
what is found here is either about to vanish, a server's bell, or left by a process that was killed at the wrong moment.

Rules that it keeps:

* whether a process lives is asked of the kernel, by the lock that the owner holds (``segment``, ``bell``), never
  judged by age or process id;
* nothing that a living process owns is removed, in another container neither, and nothing of another user, even for
  root; a file that only looks like ours (a link, a directory) is not opened.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from . import bell, segment
from .units import size_text

logger = logging.getLogger("shmtransport")

_DIRECTORY = "/dev/shm"
_BELL_FILE_PREFIX = "sem."
_BLOCK_BYTES = 512  # the unit of st_blocks


@dataclass(frozen=True)
class SharedObject:
    """A segment or bell that has a name.

    ``nbytes`` is the memory that it takes now, ``age_s`` the seconds since it was made. ``owner_pid`` is the owner's
    process id, 0 or negative if it can't be seen from here, None if it is dead.
    """

    kind: Literal["segment", "bell"]
    name: str
    nbytes: int
    owner_pid: int | None
    age_s: float

    @property
    def dead(self) -> bool:
        return self.owner_pid is None


def list_all() -> list[SharedObject]:
    """All segments and bells of this user that have a name, oldest first."""
    found = [one for one in map(_look, _files()) if one is not None]
    return sorted(found, key=lambda one: -one.age_s)


def remove_dead() -> list[SharedObject]:
    """Remove what dead processes of this user have left; what was removed."""
    return [one for one in list_all() if one.dead and _remove(one)]


def sweep() -> None:
    """As ``remove_dead``, for whoever has other things to do: says in the log what was removed, and never fails."""
    try:
        removed = remove_dead()
    except Exception:
        logger.info("what dead processes may have left in %s could not be removed", _DIRECTORY, exc_info=True)
        return
    if removed:
        logger.info("removed from %s: %s", _DIRECTORY, in_words(removed))


def in_words(objects: list[SharedObject]) -> str:
    """How many there are of each kind, and what they take: "2 segments and 1 bell (64.1 MiB) of dead processes"."""
    counts = {kind: sum(one.kind == kind for one in objects) for kind in ("segment", "bell")}
    parts = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count]
    taken = size_text(sum(one.nbytes for one in objects))
    return f"{' and '.join(parts)} ({taken}) of dead processes" if parts else "nothing"


def _files() -> Iterator[str]:
    """File names in /dev/shm that have the form of ours."""
    try:
        names = os.listdir(_DIRECTORY)
    except OSError:
        return
    for file in names:
        name = _name(file)
        if bell.is_bell_name(name) if file.startswith(_BELL_FILE_PREFIX) else segment.is_segment_name(name):
            yield file


def _name(file: str) -> str:
    return "/" + file.removeprefix(_BELL_FILE_PREFIX)


def _look(file: str) -> SharedObject | None:
    """What there is to know of one file; None if it is gone, another user's, or no file of ours."""
    name = _name(file)
    try:
        status = os.lstat(f"{_DIRECTORY}/{file}")
        if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
            return None
        nbytes = status.st_blocks * _BLOCK_BYTES
        age_s = max(time.time() - status.st_mtime, 0.0)
        if file.startswith(_BELL_FILE_PREFIX):
            owner = bell.owner_in_name(name) if bell.is_owned(bell.bell_file(name)) else None
            return SharedObject("bell", name, nbytes, owner, age_s)
        return SharedObject("segment", name, nbytes, segment.owner_of(name), age_s)
    except OSError:
        return None


def _remove(one: SharedObject) -> bool:
    if one.kind == "bell":
        return bell.remove_if_dead(bell.bell_file(one.name))
    return segment.remove_if_dead(one.name)
