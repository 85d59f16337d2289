"""What belongs to the process that made it: no other process can use it, be it by fork, by pickle or by copy.

A forked child inherits mappings, sockets and semaphores. Whatever it did with them, even by exiting, would be done to
the parent; see ``ownership`` for how a fork cuts it off.
"""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from ..errors import Closed


class BoundToProcess:
    """Base of what belongs to the process that made it: neither pickle nor copy makes another of it."""

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} can't be copied, pickled or sent to another process: it belongs to the process "
            "that made it; connect in that process instead"
        )


def forked(thing: str) -> Closed:
    """The error for using a ``thing``, for example "a client", in a forked child of the process that it belongs to."""
    return Closed(
        f"this process was forked from the one that made {thing}, and can't use it: make one after the fork, or start "
        "processes with 'spawn'"
    )
