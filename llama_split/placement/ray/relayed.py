"""A worker on another node, for the trusted side: a connection whose calls Ray carries to an actor beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from shmtransport import CallTimeout, ConnectTimeout, PeerDied, Statistics, TransportError

from .actors import Relay
from .packing import pack, unpack

SCHEME = "ray"
_STARTING_S = 60.0  # a process that imports torch on a busy machine
_MARGIN_S = 5.0  # Ray's own time for a call, besides that of the call itself


class RelayedCall:
    """A call in flight."""

    def __init__(self, reference: Any, address: str, timeout_s: float) -> None:
        self._reference = reference
        self._address = address
        self._timeout_s = timeout_s

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the result; its tensors are private.

        Raises:
            shmtransport.TransportError: as of ``shmtransport.PendingReply``.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        return unpack(_get(self._reference, self._address, limit), _private)


class RelayedCaller:
    """Makes calls that share a limit on their time."""

    def __init__(self, relay: ActorHandle[Relay], address: str, timeout_s: float) -> None:
        self._relay = relay
        self.address = address
        self._timeout_s = timeout_s

    def submit(self, method: str, /, *arguments: Any, **keywords: Any) -> RelayedCall:
        """Begin a call."""
        reference = self._relay.call.remote(method, pack(arguments), pack(keywords), self._timeout_s)
        return RelayedCall(reference, self.address, self._timeout_s + _MARGIN_S)

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method and wait for its result."""
        return self.submit(method, *arguments, **keywords).result()


class RelayedClient(RelayedCaller):
    """A connection, as ``trusted.connection.Connection`` describes it.

    Ray never starts a relay again: it would connect to a worker that was not compared with this side's model.
    ``reconnect`` starts another one.

    Args:
        start: starts the actor beside the worker.
        address: what the worker is called in errors.
        timeout_s: the longest that one call may take, in seconds.
        connect_timeout_s: how long to wait for the relay and the worker, in seconds.

    Raises:
        shmtransport.TransportError: one of them does not answer.
    """

    scheme = SCHEME
    channel = SCHEME

    def __init__(
        self, start: Callable[[], ActorHandle[Relay]], address: str, timeout_s: float, connect_timeout_s: float
    ) -> None:
        super().__init__(start(), address, timeout_s)
        self._start = start
        self._connect_timeout_s = connect_timeout_s
        self._wait_for_relay()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory: Ray copies what it carries."""
        return _private(shape, dtype)

    def with_options(self, *, timeout_s: float | None = None) -> RelayedCaller:
        """The same connection with another limit on the time of a call."""
        return RelayedCaller(self._relay, self.address, self._timeout_s if timeout_s is None else timeout_s)

    def ping(self) -> float:
        """How long a call that does nothing takes, in seconds."""
        started = time.perf_counter()
        self.call("describe")
        return time.perf_counter() - started

    def reconnect(self) -> None:
        """Start another relay, which connects to the worker that is at the address now."""
        self.close()
        self._relay = self._start()
        self._wait_for_relay()

    def close(self) -> None:
        """End the relay, and the connection with it."""
        ray.kill(self._relay)

    def statistics(self) -> Statistics:
        """Totals of this relay's connection to the worker; Ray's part is not in them."""
        found: Statistics = _get(self._relay.statistics.remote(), self.address, self._connect_timeout_s)
        return found

    def _wait_for_relay(self) -> None:
        process = self._relay.server_pid.remote()
        try:
            self.server_pid: int = _get(process, self.address, self._connect_timeout_s + _STARTING_S)
        except CallTimeout as error:
            raise ConnectTimeout(str(error)) from None


def _get(reference: Any, address: str, timeout_s: float) -> Any:
    """What a call of an actor returns; its errors are the transport's."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise CallTimeout(f"the worker at {address} did not answer in {timeout_s:g} s, by way of its relay") from None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, TransportError) else error) from None
    except RayError as error:
        told = str(error).strip().splitlines()
        raise PeerDied(f"the relay of the worker at {address} has ended: {told[0] if told else error!r}") from None


def _private(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype)
