"""The trusted side of the boundary, step by step: where arguments are made, and how each step reaches the worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import DTYPE_NAMES
from ..operations import EMBED, LM_HEAD
from ..steps import Step
from .link import WorkerLink

_ARENA_SHARE = 4  # one call's tensor takes at most this part of an arena; longer ones cross in several calls


class Remote:
    """A ``Workspace`` in the request arena, and what makes steps on the worker.

    Calls whose tensors would not fit the arenas together are cut: rows of the first two dimensions, tokens or heads,
    are independent of each other.
    """

    def __init__(self, link: WorkerLink, arena_bytes: int) -> None:
        self._link = link
        self._most = arena_bytes // (_ARENA_SHARE * link.wire.itemsize)

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """Memory for a tensor that will be sent; ordinary memory where it is too large to be sent in one piece."""
        if torch.Size(shape).numel() > self._most:
            return torch.empty(tuple(shape), dtype=self._link.wire)
        return self._link.persist(lambda: self.loan(shape))

    def loan(self, shape: Sequence[int]) -> torch.Tensor:
        """Memory of the request arena, by the connection that there is now."""
        return self._link.client.empty(shape, self._link.wire)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor where it will be sent from."""
        return self.empty(tensor.shape).copy_(tensor)

    def perform(self, step: Step) -> torch.Tensor:
        """Make one step on the worker: one call, or several where the tensors don't fit the arenas together."""
        return self._link.persist(lambda: self._perform(step))

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The embedding's rows for these ids: [B, T, D] of the wire's dtype."""
        return self.perform(Step(EMBED, 0, (ids_BT,)))

    def lm_head(self, hidden_BND: torch.Tensor) -> torch.Tensor:
        """Logits [B, N, V] of these positions, of the wire's dtype."""
        return self.perform(Step(LM_HEAD, 0, (hidden_BND,)))

    def rows_per_call(self, width: int) -> int:
        """How many rows of this width one call may carry."""
        return max(self._most // width, 1)

    def _perform(self, step: Step) -> torch.Tensor:
        sizes = step.operation.bind(step.arguments, self._link.geometry)
        shape = step.operation.result.shape(sizes)
        rows = shape[0] * shape[1]
        widest = max(torch.Size(each[2:]).numel() for each in (*(a.shape for a in step.arguments), shape))
        if rows * widest <= self._most:
            return self._call(step, step.arguments)
        result = torch.empty(shape, dtype=self._link.wire)
        whole = result.view(1, rows, *shape[2:])
        first, *others = (argument.reshape(1, rows, *argument.shape[2:]) for argument in step.arguments)
        limit = self.rows_per_call(widest)
        for row in range(0, rows, limit):
            cut = slice(row, row + limit)
            # A row that is too large by itself, as of attention scores, is cut by tokens: the first argument's.
            tokens = whole.shape[2] if whole.dim() > 3 else 1
            step_tokens = tokens if widest <= self._most else max(tokens * self._most // widest, 1)
            for token in range(0, tokens, step_tokens):
                part = slice(token, token + step_tokens)
                own = first[:, cut, part] if first.dim() > 3 else first[:, cut]
                target = whole[:, cut, part] if whole.dim() > 3 else whole[:, cut]
                target.copy_(self._call(step, (own, *(other[:, cut] for other in others))))
        return result

    def _call(self, step: Step, arguments: Sequence[torch.Tensor]) -> torch.Tensor:
        if step.operation is EMBED:
            return self._link.call(EMBED, arguments, dtype=DTYPE_NAMES[self._link.wire])
        if step.operation.per_layer:
            return self._link.call(step.operation, arguments, layer=step.layer)
        return self._link.call(step.operation, arguments)
