"""The trusted side of the boundary, step by step: where arguments are made, and how each step reaches the worker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shmtransport import Closed, PeerDied

from ..config import DTYPE_NAMES
from ..operations import EMBED, LM_HEAD
from ..steps import Step
from .link import CheckedReply, WorkerLink

not_compiled: Any = torch.compiler.disable(reason="it asks another process")  # type: ignore[no-untyped-call]
"""Decorates what torch.compile leaves alone, and breaks its graph at."""

_ARENA_SHARE = 4
"""One call's tensor takes at most this part of what the arena has for a step; longer ones cross in several calls."""


class Remote:
    """A ``Workspace`` in the request arena, and what makes steps on the worker.

    Calls whose tensors would not fit the arenas together are cut: rows of the first two dimensions, tokens or heads,
    are independent of each other. ``together`` is how many steps may be under way at once.
    """

    def __init__(self, link: WorkerLink, arena_bytes: int, together: int = 1) -> None:
        self._link = link
        self._most = arena_bytes // (_ARENA_SHARE * together * link.wire.itemsize)

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

    def begin(self, step: Step) -> Callable[[], torch.Tensor]:
        """Begin to make one step on the worker; what is returned waits for its result.

        One that the arenas have no room for beside others is made when its result is wanted, and so is one whose worker
        has died.
        """
        begun: list[CheckedReply] = []
        _, rows, widest = self._extent(step)
        if rows * widest <= self._most:
            with contextlib.suppress(PeerDied, Closed):
                begun.append(self._link.submit(step.operation, step.arguments, **self._keywords(step)))

        def finish() -> torch.Tensor:
            if begun and begun[0].epoch == self._link.epoch:
                return begun.pop().result()  # in no variable: an error's traceback would hold it, and it the error
            begun.clear()
            return self._perform(step)

        return lambda: self._link.persist(finish)

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
        shape, rows, widest = self._extent(step)
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

    def _extent(self, step: Step) -> tuple[tuple[int, ...], int, int]:
        """The shape of the result, how many rows there are, and how many elements the widest tensor has in a row."""
        sizes = step.operation.bind(step.arguments, self._link.geometry)
        shape = step.operation.result.shape(sizes)
        widest = max(torch.Size(each[2:]).numel() for each in (*(a.shape for a in step.arguments), shape))
        return shape, shape[0] * shape[1], widest

    def _call(self, step: Step, arguments: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._link.call(step.operation, arguments, **self._keywords(step))

    def _keywords(self, step: Step) -> dict[str, Any]:
        """What goes along with a step's tensors."""
        if step.operation is EMBED:
            return {"dtype": DTYPE_NAMES[self._link.wire]}
        return {"layer": step.layer} if step.operation.per_layer else {}
