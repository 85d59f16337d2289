"""What another process does with this one's connections: nothing at all.

A forked child inherits mappings, sockets and semaphores. Whatever it did with them, even by exiting, would be done to
the parent. So right after a fork every object that was registered here is told to abandon what it has. To any other
process such an object can't be sent at all, nor can it be copied.
"""

from __future__ import annotations

import os
import weakref
from typing import NoReturn, Protocol, SupportsIndex

from .errors import Closed


class Forkable(Protocol):
    """Something that a fork must cut off from the outside world."""

    def abandon(self) -> None: ...


class BoundToProcess:
    """Base of what belongs to the process that made it: neither pickle nor copy makes another of it."""

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} can't be copied, pickled or sent to another process: it belongs to the process "
            "that made it; connect in that process instead"
        )


def forked(thing: str) -> Closed:
    """The error for using a ``thing``, "a client" say, in a forked child of the process that it belongs to."""
    return Closed(
        f"this process was forked from the one that made {thing}, and can't use it: make one after the fork, or start "
        "processes with 'spawn'"
    )


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def abandon_after_fork(thing: Forkable) -> None:
    """Have ``thing.abandon()`` called in every child that is forked while it lives."""
    _registered.add(thing)


def _abandon_all() -> None:
    for thing in list(_registered):
        thing.abandon()  # and stays registered: it may connect anew in the child, and the child fork in turn


os.register_at_fork(after_in_child=_abandon_all)
