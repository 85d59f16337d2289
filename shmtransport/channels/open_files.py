"""Counts the file descriptors that this process has left.

libzmq aborts the process if it has none left when it starts its threads or accepts a connection. So code that is about
to open some checks here first, and leaves a reserve.
"""

from __future__ import annotations

import os
import resource

from ..errors import OutOfResources

_LEAST_RESERVE, _MOST_RESERVE, _RESERVE_SHARE = 4, 16, 8
_DIRECTORY = "/proc/self/fd"
_UNLIMITED = 1 << 30


def limit() -> int:
    """Return how many descriptors this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def reserve() -> int:
    """Return how many descriptors a server leaves free for the rest of its process."""
    return max(_LEAST_RESERVE, min(_MOST_RESERVE, limit() // _RESERVE_SHARE))


def free() -> int:
    """Return how many more descriptors this process may open; its limit where /proc is missing."""
    most = limit()
    try:
        numbers = os.listdir(_DIRECTORY)
    except FileNotFoundError:
        return most
    except OSError:  # no descriptor is left to list them with
        return 0
    # The listing itself used one of those listed. One above a limit that was lowered later doesn't count against it.
    return most - sum(int(number) < most for number in numbers) + 1


def require(needed: int, purpose: str, *, kept: int = 0) -> None:
    """Check that ``needed`` descriptors can be opened with ``kept`` more left free.

    Args:
        needed: how many are about to be opened.
        purpose: what needs them; begins the error's text.
        kept: how many to leave free besides.

    Raises:
        OutOfResources: too few are left.
    """
    left = free()
    if left < needed + kept:
        reserved = f" and {kept} are kept in reserve" if kept else ""
        raise OutOfResources(
            f"{purpose} needs {needed} file descriptors{reserved}; this process has {left} left of {limit()}: close "
            "files or connections, or raise its limit (ulimit -n)"
        )
