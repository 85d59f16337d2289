"""What several of these files need: types, handlers, and waiting for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from shmtransport import Server

MIB = 1 << 20
Serve = Callable[..., Server]


class DeliberateError(Exception):
    """Raised by a handler on purpose."""


def echo(value: Any = None) -> Any:
    return value


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
