"""The connection to a worker: one call at a time through it, checked, and a new connection when the worker has died.

Rules that it keeps:

* whatever a worker returns is compared with the boundary's description before it is used;
* a worker is compared with this side's model whenever it is connected to, so also when another one takes over;
* tries are bounded, and each one is logged.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from shmtransport import (
    Client,
    Closed,
    ConnectRefused,
    ConnectTimeout,
    LocalProtocolError,
    PeerDied,
    PendingReply,
    RemoteError,
)
from shmtransport.text import printable

from ..checkpoint import Checkpoint
from ..config import DTYPE_NAMES
from ..errors import SessionLost, WorkerMismatch
from ..operations import Geometry, Mode, Operation

logger = logging.getLogger("llama_split")

T = TypeVar("T")

RECONNECT_TRIES = 6
"""How often in a row a new connection is tried; each try waits as long as connecting may take."""

_ATTEMPTS = 4
_REFUSED_PAUSE_S = 1.0
_SHOWN_CHARACTERS = 400


class CheckedReply:
    """A call under way over the connection of ``epoch``, whose result is compared with what is due."""

    def __init__(self, pending: PendingReply, epoch: int, check: Callable[[Any], torch.Tensor]) -> None:
        self.epoch = epoch
        self._pending = pending
        self._check = check

    def result(self) -> torch.Tensor:
        """Wait for it.

        Raises:
            As ``WorkerLink.call``.
        """
        try:
            return self._check(self._pending.result())
        finally:
            del self  # an error's traceback holds this frame: a cycle, and with it borrowed results


class WorkerLink:
    """A connection to a worker that serves the same model.

    ``wire`` is the dtype of activations that cross; ``compute`` the one that both sides compute in. With ``reconnect``
    a worker that has died is connected to again, after ``revive`` was called, which may start it.

    Raises:
        WorkerMismatch: it serves another model, computes in another dtype, or can't serve this mode.
        shmtransport.TransportError: no worker, or none that fits this transport.
    """

    def __init__(
        self,
        client: Client,
        checkpoint: Checkpoint,
        mode: Mode,
        *,
        compute: torch.dtype,
        wire: torch.dtype,
        reconnect: bool = True,
        revive: Callable[[], None] = lambda: None,
    ) -> None:
        self.client = client
        self.wire = wire
        self.geometry: Geometry = checkpoint.geometry
        self.epoch = 0
        self._mode = mode
        self._compute = compute
        self._fingerprint = checkpoint.fingerprint()
        self._reconnect = reconnect
        self._revive = revive
        self._closed = False
        self._process = os.getpid()
        self._connecting = False
        self._lock = threading.Lock()
        self._check()

    def call(
        self,
        operation: Operation,
        arguments: Sequence[torch.Tensor],
        *,
        known: dict[str, int] | None = None,
        **keywords: Any,
    ) -> torch.Tensor:
        """One call, and its checked result; ``known`` are sizes that no argument shows.

        Raises:
            WorkerMismatch: the result is not what is due.
            shmtransport.TransportError.
        """
        return self.submit(operation, arguments, known=known, **keywords).result()

    def submit(
        self,
        operation: Operation,
        arguments: Sequence[torch.Tensor],
        *,
        known: dict[str, int] | None = None,
        **keywords: Any,
    ) -> CheckedReply:
        """Begin a call; several may be under way.

        Raises:
            shmtransport.TransportError.
        """
        sizes = operation.bind(arguments, self.geometry, **(known or {}))
        epoch = self._wait_for_connection()
        pending = self.client.submit(operation.name, *arguments, **keywords)
        return CheckedReply(pending, epoch, lambda result: self._checked(result, operation, sizes, epoch))

    def _wait_for_connection(self) -> int:
        """The epoch of the connection that there is, once it is known to lead to the right worker."""
        if self._connecting:  # another thread is: whoever it finds must be compared with this side's model first
            with self._lock:
                pass
        return self.epoch

    def _checked(self, result: Any, operation: Operation, sizes: dict[str, int], epoch: int) -> torch.Tensor:
        """A call's result, if it came over the connection of that epoch and is what is due."""
        if self._connecting or self.epoch != epoch:
            raise Closed("the connection was made anew during this call")
        expected = operation.result.shape(sizes)
        if not isinstance(result, torch.Tensor) or result.shape != expected or result.dtype != self.wire:
            found = (
                f"{list(result.shape)} of {result.dtype}" if isinstance(result, torch.Tensor) else type(result).__name__
            )
            raise WorkerMismatch(
                f"the worker at {self.client.address} answered {operation.name} with {found} where {list(expected)} of "
                f"{self.wire} is due: it is broken or hostile"
            )
        return result

    def persist(self, attempt: Callable[[], T]) -> T:
        """The result of ``attempt``, which is made anew if the worker dies meanwhile, or has lost a session's KV.

        Raises:
            shmtransport.PeerDied: no worker took over in time, or several died one after another.
        """
        for _ in range(_ATTEMPTS - 1):
            epoch = self.epoch
            try:
                return attempt()
            except (PeerDied, Closed) as error:
                if self._closed or not self._reconnect:
                    raise
                self._connect_again(epoch, error)
            except RemoteError as error:
                if error.type_name != SessionLost.__name__:
                    raise
                logger.info("the worker has dropped this session's KV, which is built again: %s", error.message)
        return attempt()

    @property
    def closed(self) -> bool:
        """Whether there is no connection for this process to end: it was closed, or is the parent's of a fork."""
        return self._closed or os.getpid() != self._process

    def close(self) -> None:
        """End the connection for good."""
        self._closed = True
        self.client.close()

    def _connect_again(self, epoch: int, cause: Exception) -> None:
        """Connect to whichever worker is at the address now, unless another thread has done so."""
        with self._lock:
            if self.epoch != epoch:
                return
            self._connecting = True
            try:
                self._try_to_connect(cause)
            finally:
                self._connecting = False

    def _try_to_connect(self, cause: Exception) -> None:
        address = self.client.address
        failure = ""  # the words alone: an exception would keep this frame, and what it holds, alive
        for attempt in range(1, RECONNECT_TRIES + 1):
            self._refuse_closed()
            tries = f"try {attempt} of {RECONNECT_TRIES}"
            logger.warning("the worker at %s was lost (%s): connecting again, %s", address, failure or cause, tries)
            try:
                self._revive()
                self._connect_and_check()
            except (ConnectTimeout, PeerDied) as error:
                failure = str(error)
            except ConnectRefused as error:
                failure = str(error)
                time.sleep(_REFUSED_PAUSE_S)  # it is there, and may have room soon
            else:
                self.epoch += 1
                logger.warning("connected to the worker at %s again (process %d)", address, self.client.server_pid)
                return
        raise PeerDied(f"the worker at {address} was lost, and none took over: {failure}") from cause

    def _connect_and_check(self) -> None:
        """Connect to whoever is there; a connection that is not the right worker's is not kept."""
        self.client.reconnect()
        try:
            self._refuse_closed()
            self._check()
        except BaseException:
            self.client.close()
            raise

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("this model was closed")

    def _check(self) -> None:
        """Compare what the worker says of itself with this side's model."""
        address = self.client.address
        try:
            found = self.client.call("describe")
        except (LocalProtocolError, RemoteError) as error:
            raise WorkerMismatch(f"the server at {address} is no worker of llama-split: {error}") from error
        if not isinstance(found, dict) or not {"geometry", "fingerprint", "dtype", "embedding"} <= found.keys():
            raise WorkerMismatch(f"the server at {address} does not describe itself as a worker of llama-split does")
        if found["geometry"] != repr(self.geometry):
            raise WorkerMismatch(
                f"the worker at {address} serves another model, {_shown(found['geometry'])}; "
                f"this side has {self.geometry}: start it with the same --model"
            )
        if found["fingerprint"] != self._fingerprint:
            raise WorkerMismatch(
                f"the worker at {address} has a model of this shape but other weights: start it with the same --model"
            )
        wanted = DTYPE_NAMES[self._compute]
        if found["dtype"] != wanted:
            raise WorkerMismatch(
                f"the worker at {address} computes in {_shown(found['dtype'])}, this side in {wanted}: "
                "use one dtype on both"
            )
        if self._mode is Mode.OP and found["embedding"] is not True:
            raise WorkerMismatch(
                f"the worker at {address} holds no embedding, which mode op asks it for: start it with --embedding"
            )


def _shown(said: object) -> str:
    """What a worker says of itself, in one line that can do no harm."""
    return printable(str(said)[:_SHOWN_CHARACTERS])
