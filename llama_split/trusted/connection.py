"""What the trusted side needs of a way to reach a worker. ``shmtransport.Client`` is one; others may wrap it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from shmtransport import Client, Statistics


class Pending(Protocol):
    """A call in flight."""

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the call's result, for ``timeout_s`` seconds or as long as the connection's calls may take."""


class Caller(Protocol):
    """Makes calls."""

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method and wait for its result."""


class Connection(Caller, Protocol):
    """A connection to one worker; all methods are those of ``shmtransport.Client``, with its errors."""

    @property
    def address(self) -> str:
        """Where the worker is."""

    @property
    def scheme(self) -> str:
        """The address's: "ipc", "tcp", or another for a worker on another machine."""

    @property
    def channel(self) -> str:
        """What carries the control messages."""

    @property
    def server_pid(self) -> int:
        """The worker's process id, on its own machine."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory for an argument."""

    def submit(self, method: str, /, *arguments: Any, **keywords: Any) -> Pending:
        """Begin a call."""

    def with_options(self, *, timeout_s: float | None = None) -> Caller:
        """The same connection with another limit on the time of a call, in seconds."""

    def ping(self) -> float:
        """How long a call that does nothing takes, in seconds."""

    def reconnect(self) -> None:
        """Connect again, to the worker that is at the address now."""

    def close(self) -> None:
        """End the connection."""

    def statistics(self) -> Statistics:
        """Totals since it was made."""


class Reachable(Protocol):
    """A worker that is reached in another way than at an address of this machine."""

    def connect(self, **options: Any) -> Connection:
        """Connect to it, with the options of ``shmtransport.Client``."""


def open_connection(worker: str | Reachable, **options: Any) -> Connection:
    """Connect to a worker at an address of this machine, or to one that is reached in another way.

    Raises:
        shmtransport.TransportError: it does not answer.
    """
    return Client(worker, **options) if isinstance(worker, str) else worker.connect(**options)
