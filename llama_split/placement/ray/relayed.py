"""A worker on another node, for the trusted side: a connection whose calls Ray carries to an actor beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from shmtransport import CallTimeout, ConnectTimeout, PeerDied, Statistics, TransportError

from .actors import Relay
from .packing import pack, unpack

SCHEME = "ray"
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
    """Makes calls that may take so long."""

    def __init__(self, relay: ActorHandle[Relay], address: str, timeout_s: float) -> None:
        self._relay = relay
        self.address = address
        self._timeout_s = timeout_s

    def submit(self, method: str, /, *arguments: Any, **keywords: Any) -> RelayedCall:
        """Begin a call."""
        try:
            reference = self._relay.call.remote(method, pack(arguments), pack(keywords), self._timeout_s)
        except RayActorError as error:
            raise _lost(self.address, error) from None
        return RelayedCall(reference, self.address, self._timeout_s + _MARGIN_S)

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a method and wait for its result."""
        return self.submit(method, *arguments, **keywords).result()


class RelayedClient(RelayedCaller):
    """A connection, as ``trusted.connection.Connection`` describes it.

    Args:
        relay: the actor beside the worker.
        address: what the worker is called in errors.
        timeout_s: the longest that one call may take, in seconds.
        connect_timeout_s: how long to wait for the relay and the worker, in seconds.

    Raises:
        shmtransport.TransportError: one of them does not answer.
    """

    scheme = SCHEME
    channel = SCHEME

    def __init__(self, relay: ActorHandle[Relay], address: str, timeout_s: float, connect_timeout_s: float) -> None:
        super().__init__(relay, address, timeout_s)
        self._connect_timeout_s = connect_timeout_s
        self._connected(relay.server_pid.remote())

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
        """Have the relay connect again, to the worker that is at the address now."""
        self._connected(self._relay.reconnect.remote())

    def close(self) -> None:
        """End the relay, and the connection with it."""
        with contextlib.suppress(RayActorError):
            ray.kill(self._relay)

    def statistics(self) -> Statistics:
        """Totals of the relay's connection to the worker; Ray's part is not in them."""
        found: Statistics = _get(self._relay.statistics.remote(), self.address, self._connect_timeout_s)
        return found

    def _connected(self, process: Any) -> None:
        try:
            self.server_pid: int = _get(process, self.address, self._connect_timeout_s + _MARGIN_S)
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
    except RayActorError as error:
        raise _lost(address, error) from None


def _lost(address: str, error: RayActorError) -> PeerDied:
    return PeerDied(f"the relay of the worker at {address} has ended: {str(error).splitlines()[0]}")


def _private(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype)
