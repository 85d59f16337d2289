"""What a forked child does with its parent's connections: nothing at all.

A child inherits mappings, sockets and semaphores. Whatever it did with them, even by exiting, would be done to the
parent. So right after a fork every object that was registered here is told to abandon what it has.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Something that a fork must cut off from the outside world."""

    def abandon(self) -> None: ...


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def abandon_after_fork(thing: Forkable) -> None:
    """Have ``thing.abandon()`` called in every child that is forked while it lives."""
    _registered.add(thing)


def _abandon_all() -> None:
    for thing in list(_registered):
        thing.abandon()  # and stays registered: it may connect anew in the child, and the child fork in turn


os.register_at_fork(after_in_child=_abandon_all)
