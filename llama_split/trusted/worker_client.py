"""The connection to a worker: checked calls, and a new connection when the worker has died.

Rules that it keeps:

* A result is compared with the boundary's description before it is used.
* Every worker is compared with this side's model when it is connected to, replacements included.
* The number of tries is bounded, and each one is logged.
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
    Closed,
    ConnectRefused,
    ConnectTimeout,
    LocalProtocolError,
    PeerDied,
    RemoteError,
)
from shmtransport.text import printable

from ..boundary.compute import WORKER_DTYPE_NAMES
from ..boundary.division import layers_text, parse_layers
from ..boundary.geometry import Geometry
from ..boundary.operations import Mode, Operation
from ..checkpoint import Checkpoint
from ..errors import LlamaSplitError, SessionLost, WorkerMismatch
from .connection import Connection, Pending

logger = logging.getLogger("llama_split")

T = TypeVar("T")
Shape = tuple[int, ...]

RECONNECT_TRIES = 6
"""Tries to connect again in a row; each waits as long as connecting may take."""

LOSSES = (PeerDied, Closed)
"""What a call raises if its connection has ended."""

_ATTEMPTS = 4
_REFUSED_PAUSE_S = 1.0
_SHOWN_CHARACTERS = 400
_DESCRIBED = {"geometry", "fingerprint", "dtype", "embedding", "layers", "sessions"}


class CheckedReply:
    """A call in flight; its result is checked before it is handed out."""

    def __init__(self, pending: Pending, check: Callable[[Any], torch.Tensor], on_loss: Callable[[], None]) -> None:
        self._pending = pending
        self._check = check
        self._on_loss = on_loss

    def result(self) -> torch.Tensor:
        """Wait for the result.

        Raises:
            WorkerMismatch: its shape or dtype is wrong.
            shmtransport.TransportError: the call failed.
        """
        try:
            return self._check(self._pending.result())
        except LOSSES:
            self._on_loss()
            raise
        finally:
            del self  # an error's traceback holds this frame: a cycle, and with it borrowed results


class WorkerClient:
    """A connection to a worker that serves the same model.

    Args:
        client: connected to it.
        checkpoint: this side's model.
        mode: the split.
        compute: the dtype that both sides compute in.
        wire: the dtype of activations that cross.
        reconnect: connect again when the worker has died.
        revive: called before each try to connect again; may start the worker.

    Raises:
        WorkerMismatch: the worker serves another model, computes in another dtype, or can't serve this mode.
        shmtransport.TransportError: the worker did not answer.
    """

    def __init__(
        self,
        client: Connection,
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
        self.epoch = 0  # counts the connections that have replaced the first one
        self._lost_epoch = -1  # of the last connection that a call has found ended
        self._mode = mode
        self._compute = compute
        self._fingerprint = checkpoint.fingerprint()
        self._reconnect = reconnect
        self._revive = revive
        self._closed = False
        self._process = os.getpid()
        self._replacing = threading.Lock()
        # Cleared while a thread replaces the connection: calls of other threads wait until its worker was compared, and
        # the result of a call that began just before is refused.
        self._settled = threading.Event()
        self._settled.set()
        described = self._checked_description()
        self.layers = _layers_of(described, client.address, self.geometry.layers)
        self.has_embedding = described["embedding"] is True
        self.most_sessions = max(described["sessions"], 1) if type(described["sessions"]) is int else 1

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """As ``loan``, over a new connection if the worker has died."""
        return persist((self,), lambda: self.loan(shape))

    def execute(
        self, operation: Operation, arguments: Sequence[torch.Tensor], shape: Shape, **keywords: Any
    ) -> torch.Tensor:
        """As ``call``, repeated over a new connection if the worker dies."""
        return persist((self,), lambda: self.call(operation, arguments, shape, **keywords))

    def loan(self, shape: Sequence[int]) -> torch.Tensor:
        """Uninitialised memory in the request arena, in the wire's dtype."""
        return self._noting_loss(self.epoch, lambda: self.client.empty(shape, self.wire))

    def call(
        self, operation: Operation, arguments: Sequence[torch.Tensor], shape: Shape, **keywords: Any
    ) -> torch.Tensor:
        """Run one operation on the worker and wait for its result.

        Args:
            operation: what to run.
            arguments: its tensors.
            shape: the shape that the result must have.
            keywords: its other arguments.

        Raises:
            WorkerMismatch: the result has another shape or dtype.
            shmtransport.TransportError: the call failed.
        """
        return self.submit(operation, arguments, shape, **keywords).result()

    def submit(
        self, operation: Operation, arguments: Sequence[torch.Tensor], shape: Shape, **keywords: Any
    ) -> CheckedReply:
        """As ``call``, without waiting for the result; several calls may be in flight.

        Raises:
            shmtransport.TransportError: the call was not sent.
        """
        if not self._settled.is_set():
            self._settled.wait()
        epoch = self.epoch
        pending = self._noting_loss(epoch, lambda: self.client.submit(operation.name, *arguments, **keywords))
        return CheckedReply(
            pending,
            lambda result: self._checked(result, operation, shape, epoch),
            lambda: self._note_loss(epoch),
        )

    def recover(self, epoch: int, cause: Exception) -> bool:
        """Replace the connection of that epoch, if a call has found it ended; otherwise return False.

        Raises:
            Exception: ``cause``, if this client does not reconnect or was closed.
            shmtransport.PeerDied: no worker took over.
        """
        if self._lost_epoch < epoch:
            return False
        if self._closed or not self._reconnect:
            raise cause
        self._replace_connection(epoch, cause)
        return True

    def _noting_loss(self, epoch: int, use: Callable[[], T]) -> T:
        """Use the connection of that epoch; if it has ended, ``recover`` knows."""
        try:
            return use()
        except LOSSES:
            self._note_loss(epoch)
            raise

    def _note_loss(self, epoch: int) -> None:
        self._lost_epoch = max(self._lost_epoch, epoch)

    def _checked(self, result: Any, operation: Operation, shape: Shape, epoch: int) -> torch.Tensor:
        """The result of a call, if it came over the connection of that epoch and is what the boundary describes."""
        if self.epoch != epoch or not self._settled.is_set():
            raise Closed("the connection was replaced during this call")
        if not isinstance(result, torch.Tensor) or result.shape != shape or result.dtype != self.wire:
            found = (
                f"{list(result.shape)} of {result.dtype}" if isinstance(result, torch.Tensor) else type(result).__name__
            )
            raise WorkerMismatch(
                f"the worker at {self.client.address} answered {operation.name} with {found} where {list(shape)} of "
                f"{self.wire} is expected: it is broken or hostile"
            )
        return result

    def ping(self) -> None:
        """Ask whether the worker answers; connect again if it has died.

        Raises:
            shmtransport.PeerDied: no worker took over.
        """
        persist((self,), lambda: self._noting_loss(self.epoch, self.client.ping))

    @property
    def closed(self) -> bool:
        """True if this process has no connection to end: it was closed, or belongs to the parent of a fork."""
        return self._closed or os.getpid() != self._process

    def close(self) -> None:
        """End the connection for good."""
        self._closed = True
        self.client.close()

    def _replace_connection(self, epoch: int, cause: Exception) -> None:
        """Connect to the worker that is at the address now, unless another thread has replaced that epoch already."""
        with self._replacing:
            if self.epoch != epoch:
                return
            self._settled.clear()
            try:
                self._try_to_connect(cause)
            finally:
                self._settled.set()

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
                time.sleep(_REFUSED_PAUSE_S)  # the worker is there, and may have room soon
            else:
                self.epoch += 1
                logger.warning("connected to the worker at %s again (process %d)", address, self.client.server_pid)
                return
        raise PeerDied(f"the worker at {address} was lost, and none took over: {failure}") from cause

    def _connect_and_check(self) -> None:
        """Connect once; keep the connection only if it leads to the right worker."""
        self.client.reconnect()
        try:
            self._refuse_closed()
            described = self._checked_description()
            address = self.client.address
            if (found := _layers_of(described, address, self.geometry.layers)) != self.layers:
                raise WorkerMismatch(
                    f"the worker at {address} now holds layers {layers_text(found)}; the one before held "
                    f"{layers_text(self.layers)}: start it with --layers {layers_text(self.layers)}"
                )
            if self.has_embedding and self._mode is Mode.OP:
                check_embedding([described["embedding"] is True], [address])
        except BaseException:
            self.client.close()
            raise

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("this model was closed")

    def _checked_description(self) -> dict[str, Any]:
        """The worker's description of itself, once it was compared with this side's model.

        Raises:
            WorkerMismatch: they differ.
        """
        address = self.client.address
        try:
            found = self.client.call("describe")
        except (LocalProtocolError, RemoteError) as error:
            raise WorkerMismatch(f"the server at {address} is no worker of llama-split: {error}") from error
        if not isinstance(found, dict) or not found.keys() >= _DESCRIBED:
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
        wanted = WORKER_DTYPE_NAMES[self._compute]
        if found["dtype"] != wanted:
            raise WorkerMismatch(
                f"the worker at {address} computes in {_shown(found['dtype'])}, and this side needs {wanted}: "
                f"start it with --dtype {wanted}"
            )
        return found


def persist(workers: Sequence[WorkerClient], attempt: Callable[[], T]) -> T:
    """Return what ``attempt`` returns; repeat it if one of the workers dies, or has dropped a session's KV.

    Raises:
        shmtransport.PeerDied: no worker took over in time, or several died in a row.
    """
    for _ in range(_ATTEMPTS - 1):
        epochs = [worker.epoch for worker in workers]
        try:
            return attempt()
        except LOSSES as error:
            recovered = [worker.recover(epoch, error) for worker, epoch in zip(workers, epochs, strict=True)]
            if not any(recovered):
                raise
        except RemoteError as error:
            if error.type_name != SessionLost.__name__:
                raise
            logger.info("a worker has dropped this session's KV, which is built again: %s", error.message)
    return attempt()


def check_embedding(held: Sequence[bool], addresses: Sequence[str]) -> None:
    """Check that one of the workers at these addresses holds the embedding, as mode op needs.

    Raises:
        WorkerMismatch: none does.
    """
    if not any(held):
        raise WorkerMismatch(
            f"the worker at {' or '.join(addresses)} holds no embedding, which mode op needs: start it with --embedding"
        )


def _layers_of(described: dict[str, Any], address: str, layers: int) -> range:
    """The layers that a worker says it holds."""
    text = described["layers"]
    try:
        return parse_layers(text if isinstance(text, str) else "", layers)
    except LlamaSplitError as error:
        raise WorkerMismatch(f"the worker at {address} says of itself: {_shown(error)}") from None


def _shown(text: object) -> str:
    """Part of a worker's description as one bounded, printable line."""
    return printable(str(text)[:_SHOWN_CHARACTERS])
