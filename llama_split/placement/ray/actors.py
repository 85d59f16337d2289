"""The actors of a replica: its workers, and on other nodes what reaches them.

Ray starts a worker that has died again, with the same arguments: it is at the same address then, where clients that
reconnect find it.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from shmtransport import Client, Statistics

from ...boundary.choices import parse_mode
from ...boundary.compute import parse_device, parse_dtype
from ...boundary.operations import Mode
from ...worker.listening import server_for
from ...worker.service import Service
from ...worker.weights import Weights
from ..local import remove_directory_of, temporary_directory
from .packing import pack, unpack
from .plan import Plan

_STOP_S = 5.0


def address_of(replica: str, worker: int) -> str:
    """Where a replica's worker listens on its node: in a directory of its own."""
    name = f"llama-split-{replica}-{worker}"
    return f"ipc://{temporary_directory(len(name) + len('//worker.ipc'))}/{name}/worker.ipc"


class WorkerActor:
    """A worker: answers calls in a thread of its own, for as long as the actor lives.

    Args:
        plan: what is served.
        replica: names the replica that it belongs to.
        worker: its place among the replica's workers.
    """

    def __init__(self, plan: Plan, replica: str, worker: int) -> None:
        torch.set_num_threads(plan.threads)
        self._address = address_of(replica, worker)
        os.makedirs(os.path.dirname(self._address.removeprefix("ipc://")), mode=0o700, exist_ok=True)
        checkpoint = plan.open_checkpoint()
        self._server = server_for(self._address, parse_device(plan.device))
        weights = Weights(
            checkpoint,
            parse_dtype(plan.dtype),
            parse_device(plan.device),
            embedding=worker == 0 and parse_mode(plan.mode) is Mode.OP,
            layers=plan.shares(checkpoint)[worker].layers,
        )
        Service(self._server, weights, checkpoint)
        self._serving = threading.Thread(target=self._server.serve, name="llama-split-worker", daemon=True)
        self._serving.start()

    def address(self) -> str:
        """Where it listens, now that it does."""
        return self._address

    def stop(self) -> None:
        """Answer no more calls, and leave nothing behind."""
        self._server.stop()
        self._serving.join(_STOP_S)
        self._server.close()
        remove_directory_of(self._address)


class Relay:
    """Holds the connection to a worker of its node, for a trusted process on another one.

    Calls are made one after the other, in the order in which they come.

    Args:
        address: where the worker listens on this node.
        options: those of ``shmtransport.Client``.

    Raises:
        shmtransport.TransportError: the worker does not answer.
    """

    def __init__(self, address: str, options: dict[str, Any]) -> None:
        self._client = Client(address, **options)

    def server_pid(self) -> int:
        """The worker's process id."""
        return self._client.server_pid

    def call(self, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any], timeout_s: float) -> Any:
        """Call a method of the worker; all that comes and goes is packed."""
        given = unpack((arguments, keywords), self._client.empty)
        return pack(self._client.with_options(timeout_s=timeout_s).call(method, *given[0], **given[1]))

    def statistics(self) -> Statistics:
        """Totals of the connection, which is one through shared memory."""
        return self._client.statistics()
