"""The registry of what this process owns: the one place that a fork empties.

A process can't see its own record locks, and the kernel doesn't tell its client from its server. So it keeps here which
names in /dev/shm and which segments are its own. A forked child owns none of them, and must not touch its parent's
connections: the registry is emptied there, and every object that was registered is told to abandon what it has.
"""

from __future__ import annotations

import os
import weakref
from typing import Literal, Protocol, TypeAlias

Role: TypeAlias = Literal["client", "server", ""]
"""Which side of a connection a segment was made for; empty where that does not matter."""


class Forkable(Protocol):
    """Something that a fork must cut off from the outside world."""

    def abandon(self) -> None: ...


class Registry:
    """What one process owns. Safe for use by several threads: every method makes one change, or none."""

    def __init__(self) -> None:
        self._names: dict[str, Role] = {}
        self._segments: set[tuple[int, int]] = set()
        self._forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()

    def add_name(self, name: str, role: Role = "") -> None:
        """Add a name that is about to be given to an object; to be called before the object has it."""
        self._names[name] = role

    def drop_name(self, name: str) -> None:
        """Drop a name that was removed."""
        self._names.pop(name, None)

    def role_of(self, name: str) -> Role | None:
        """The role that a name was added with; None if it is not this process's."""
        return self._names.get(name)

    def add_segment(self, fd: int) -> None:
        """Add a segment on which this process holds the owner's lock."""
        self._segments.add(_identity(fd))

    def drop_segment(self, fd: int) -> None:
        """Drop a segment that is about to be closed; its lock goes with the file descriptor."""
        self._segments.discard(_identity(fd))

    def owns_segment(self, fd: int) -> bool:
        """Whether the segment behind a file descriptor is this process's, however it was opened."""
        return _identity(fd) in self._segments

    def abandon_after_fork(self, thing: Forkable) -> None:
        """Have ``thing.abandon()`` called in every child that is forked while it lives."""
        self._forkables.add(thing)

    def after_fork(self) -> None:
        """In a forked child: own nothing.

        What was registered stays registered: it may connect in the child, and the child fork in turn.
        """
        self._names.clear()
        self._segments.clear()
        for thing in list(self._forkables):
            thing.abandon()


def _identity(fd: int) -> tuple[int, int]:
    """Device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


registry = Registry()
os.register_at_fork(after_in_child=registry.after_fork)
