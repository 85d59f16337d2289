"""Handlers of the linear operations, which every worker has, and the description of the worker to its clients.

Results have the dtype of their arguments, which is the wire's and may differ from the one that the worker computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from shmtransport import Server

from ..boundary.compute import DTYPE_NAMES, WORKER_DTYPE_NAMES
from ..boundary.division import layers_text
from ..boundary.geometry import Geometry
from ..boundary.operations import LINEARS, Operation
from ..checkpoint import Checkpoint


class Held(Protocol):
    """The weights of a worker, whatever it computes with."""

    geometry: Geometry
    held: range
    dtype: torch.dtype
    device: torch.device

    def linear(self, operation: Operation, layer: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The product with a matrix into memory of the caller's.

        Raises:
            ValueError: this worker does not hold it.
        """


class LinearService:
    """The handlers of one model, for all clients of one server.

    Args:
        server: where the handlers are registered.
        weights: the model's matrices.
        checkpoint: describes the model to clients.
        facts: more of what the worker tells about itself.
    """

    wires: tuple[torch.dtype, ...] = tuple(DTYPE_NAMES)
    """What may cross."""

    def __init__(self, server: Server, weights: Held, checkpoint: Checkpoint, **facts: Any) -> None:
        self._server = server
        self._held = weights
        self._description = {
            "fingerprint": checkpoint.fingerprint(),
            "geometry": repr(checkpoint.geometry),
            "dtype": WORKER_DTYPE_NAMES[weights.dtype],
            "device": str(weights.device),
            "embedding": False,
            "layers": layers_text(weights.held),
            "sessions": 1,
            **facts,
        }
        for operation in LINEARS:
            server.register(operation.name, self._linear_handler(operation))
        server.register("describe", lambda: self._description)

    def _linear_handler(self, operation: Operation) -> Callable[..., torch.Tensor]:
        @torch.inference_mode()
        def linear(argument: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
            (mine,), result = self._bind(operation, argument)
            return self._held.linear(operation, layer)(mine, result)

        return linear

    def _bind(
        self, operation: Operation, *arguments: torch.Tensor, **known: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Check arguments against the boundary's description.

        Returns:
            The arguments on the worker's device and in its dtype, and memory for the result.

        Raises:
            ValueError: the arguments don't fit the description.
        """
        sizes = operation.bind(arguments, self._held.geometry, **known)
        wire = arguments[0].dtype
        if wire not in self.wires or any(argument.dtype != wire for argument in arguments):
            found = ", ".join(str(argument.dtype) for argument in arguments)
            taken = " or ".join(str(one).removeprefix("torch.") for one in self.wires)
            raise ValueError(f"{operation.name} takes tensors of one dtype, {taken}: {found}")
        mine = [self._taken(self._server.to_device(argument)) for argument in arguments]
        return mine, self._result(operation.result.shape(sizes), wire)

    def _taken(self, argument: torch.Tensor) -> torch.Tensor:
        """An argument as the product takes it."""
        return argument.to(self._held.device, self._held.dtype)

    def _result(self, shape: Sequence[int], wire: torch.dtype) -> torch.Tensor:
        """Memory for a result: in the client's reply arena if the worker computes on the CPU.

        From a GPU the server copies it there, while this worker serves others.
        """
        if self._held.device.type == "cpu":
            return self._server.empty(shape, wire)
        return torch.empty(tuple(shape), dtype=wire, device=self._held.device)


class IntegerService(LinearService):
    """A worker that computes with whole numbers: linear operations only."""

    wires = (torch.int32,)

    def _taken(self, argument: torch.Tensor) -> torch.Tensor:
        return argument.to(self._held.device)
