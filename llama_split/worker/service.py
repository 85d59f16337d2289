"""The worker's side of the boundary: registers every operation of ``operations`` with a server.

Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shmtransport import Server

from ..checkpoint import Checkpoint
from ..config import DTYPE_NAMES
from ..decoder import empty_on, run
from ..operations import LAYER, LINEARS, STACK, Operation
from .kernels import Weights, result_shape
from .sessions import Sessions


class Service:
    """Handlers over one model's weights, for all clients of one server."""

    def __init__(self, server: Server, weights: Weights, checkpoint: Checkpoint) -> None:
        self._server = server
        self._weights = weights
        self.sessions = Sessions(weights)
        self._description = {
            "fingerprint": checkpoint.fingerprint(),
            "geometry": repr(checkpoint.geometry),
            "dtype": DTYPE_NAMES[weights.dtype],
            "device": str(weights.device),
        }
        for operation in LINEARS:
            server.register(operation.name, self._linear_handler(operation))
        server.register(LAYER.name, self._layer)
        server.register(STACK.name, self._stack)
        server.register("describe", lambda: self._description)
        server.register("end_session", self._end_session)
        server.on_disconnect(self.sessions.end_connection)

    def _linear_handler(self, operation: Operation) -> Callable[..., torch.Tensor]:
        @torch.inference_mode()
        def linear(argument: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
            shape = result_shape(operation, self._weights, argument)
            matrix = self._weights.linear(operation, layer)
            return matrix(argument.to(self._weights.device), self._result(shape))

        return linear

    @torch.inference_mode()
    def _layer(
        self,
        hidden_BTD: torch.Tensor,
        *,
        layer: int,
        session: int,
        start: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """One decoder layer; ``start`` comes with the first of a forward: positions, padding, past, select."""
        shape = result_shape(LAYER, self._weights, hidden_BTD)
        if hidden_BTD.dim() != 3:
            raise ValueError(f"layer takes [batch, tokens, hidden], not {list(hidden_BTD.shape)}")
        opened = self.sessions.open(self._server.connection_id, session)
        hidden_BTD = hidden_BTD.to(self._weights.device)
        if start is not None:
            opened.begin(hidden_BTD, **start)
        context = opened.enter(layer)
        return run(
            self._weights.layers[layer].steps(hidden_BTD, context, empty_on(self._weights.device), self._result(shape)),
            self._weights.perform,
        )

    @torch.inference_mode()
    def _stack(self, hidden_BTD: torch.Tensor, *, session: int, start: dict[str, Any], keep: int) -> torch.Tensor:
        """All decoder layers, the final norm, and the logits of the last ``keep`` tokens."""
        result_shape(STACK, self._weights, hidden_BTD)
        if hidden_BTD.dim() != 3 or type(keep) is not int or not 0 <= keep <= hidden_BTD.shape[1]:
            raise ValueError(
                f"stack takes [batch, tokens, hidden] and how many tokens' logits are wanted, not "
                f"{list(hidden_BTD.shape)} and {keep}"
            )
        opened = self.sessions.open(self._server.connection_id, session)
        empty = empty_on(self._weights.device)
        hidden_BTD = hidden_BTD.to(self._weights.device)
        opened.begin(hidden_BTD, **start)
        for index, layer in enumerate(self._weights.layers):
            hidden_BTD = run(layer.steps(hidden_BTD, opened.enter(index), empty), self._weights.perform)
        kept_BTD = hidden_BTD[:, hidden_BTD.shape[1] - keep :]
        logits = self._result((*kept_BTD.shape[:-1], self._weights.geometry.vocab))
        return self._weights.lm_head(self._weights.norm(kept_BTD, empty), logits)

    def _result(self, shape: Sequence[int]) -> torch.Tensor:
        """Memory for a result: the caller's reply arena where the worker computes on the CPU."""
        if self._weights.device.type == "cpu":
            return self._server.empty(shape, self._weights.dtype)
        return empty_on(self._weights.device)(shape, self._weights.dtype)

    def _end_session(self, number: int) -> None:
        self.sessions.end(self._server.connection_id, number)
