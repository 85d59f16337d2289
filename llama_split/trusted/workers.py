"""The workers that hold a model's layers together, and which of them an operation goes to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import torch

from ..boundary.division import check_complete
from ..boundary.geometry import Geometry
from ..boundary.operations import EMBED, Mode
from ..model.program import WorkerOp
from .connection import Connection, Reachable
from .worker_client import WorkerClient, check_embedding, persist

T = TypeVar("T")


class Workers(Sequence[WorkerClient]):
    """One worker, or several in the order of their layers.

    Args:
        clients: connected, all to workers of the same model.
        mode: the split.

    Raises:
        WorkerMismatch: the workers don't hold each layer once, or not what this mode needs.
    """

    def __init__(self, clients: Sequence[WorkerClient], mode: Mode) -> None:
        self._clients = tuple(clients)
        self.geometry: Geometry = clients[0].geometry
        self.wire: torch.dtype = clients[0].wire
        check_complete([client.layers for client in clients], self.geometry.layers)
        if mode is Mode.OP:
            check_embedding([client.has_embedding for client in clients], self.addresses)
        self._by_layer = [client for client in clients for _ in client.layers]
        self._embedding = next((client for client in clients if client.has_embedding), clients[0])

    @overload
    def __getitem__(self, index: int) -> WorkerClient: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[WorkerClient]: ...

    def __getitem__(self, index: int | slice) -> WorkerClient | Sequence[WorkerClient]:
        return self._clients[index]

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def last(self) -> WorkerClient:
        """The one that holds the last layer, the final norm and the output matrix."""
        return self._clients[-1]

    @property
    def addresses(self) -> list[str]:
        """Where they are."""
        return [client.client.address for client in self._clients]

    @property
    def epochs(self) -> list[int]:
        """For each one, how many connections have replaced the first."""
        return [client.epoch for client in self._clients]

    @property
    def closed(self) -> bool:
        """True if this process has no connection to end."""
        return all(client.closed for client in self._clients)

    def of(self, op: WorkerOp) -> WorkerClient:
        """The one that holds what an operation needs."""
        if op.operation.per_layer:
            return self._by_layer[op.layer]
        return self._embedding if op.operation is EMBED else self.last

    def of_layer(self, index: int) -> WorkerClient:
        """The one that holds a layer."""
        return self._by_layer[index]

    def persist(self, attempt: Callable[[], T]) -> T:
        """Return what ``attempt`` returns; repeat it if a worker dies, or has dropped a session's KV.

        Raises:
            shmtransport.PeerDied: no worker took over in time, or several died in a row.
        """
        return persist(self._clients, attempt)

    def close(self) -> None:
        """End all connections for good."""
        for client in self._clients:
            client.close()


def connect(
    named: Sequence[str | Reachable],
    open_client: Callable[[str | Reachable], Connection],
    check: Callable[[Connection], WorkerClient],
    mode: Mode,
) -> Workers:
    """Connect to the workers of a model.

    Args:
        named: where they are, in the order of their layers.
        open_client: connects to one of them.
        check: makes a ``WorkerClient`` of a connection, which compares the worker with this side's model.
        mode: the split.

    Raises:
        WorkerMismatch: a worker serves another model, or they don't hold each layer once.
        shmtransport.TransportError: one does not answer.
    """
    with contextlib.ExitStack() as undo:
        connected = []
        for one in named:
            client = open_client(one)
            undo.callback(client.close)
            connected.append(check(client))
        workers = Workers(connected, mode)
        undo.pop_all()
    return workers
