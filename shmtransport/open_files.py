"""How many file descriptors this process has left.

libzmq ends the process where it finds none: when it makes its threads, and when it accepts a connection. So what is
about to need some asks here first, and leaves a reserve.
"""

from __future__ import annotations

import os
import resource

from .errors import OutOfResources

_LEAST_RESERVE, _MOST_RESERVE, _RESERVE_SHARE = 4, 16, 8
_DIRECTORY = "/proc/self/fd"
_UNLIMITED = 1 << 30


def limit() -> int:
    """The most descriptors that this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def reserve() -> int:
    """How many descriptors a server leaves free for everything else that its process does."""
    return max(_LEAST_RESERVE, min(_MOST_RESERVE, limit() // _RESERVE_SHARE))


def free() -> int:
    """How many descriptors this process may still open; where /proc is not mounted, its limit."""
    most = limit()
    try:
        numbers = os.listdir(_DIRECTORY)
    except FileNotFoundError:
        return most
    except OSError:  # not one left to list them with
        return 0
    # One of those listed was the listing's own. One above a limit that was lowered later takes nothing from it.
    return most - sum(int(number) < most for number in numbers) + 1


def require(needed: int, purpose: str, *, kept: int = 0) -> None:
    """Check that ``needed`` descriptors can be opened and ``kept`` more are left.

    Raises:
        OutOfResources: they can't.
    """
    left = free()
    if left < needed + kept:
        reserved = f" and {kept} are kept in reserve" if kept else ""
        raise OutOfResources(
            f"{purpose} needs {needed} file descriptors{reserved}; this process has {left} left of {limit()}: close "
            "files or connections, or raise its limit (ulimit -n)"
        )
