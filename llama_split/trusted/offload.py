"""Sends the operations of a program to the workers, in chunks where a tensor is too large for the arenas.

Shape suffixes: B batch, T tokens, N tokens whose logits are asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from shmtransport import Closed, PeerDied

from ..boundary.compute import DTYPE_NAMES
from ..boundary.geometry import Geometry
from ..boundary.operations import EMBED, LM_HEAD, Operation, sizes_of
from ..errors import WorkerTampered
from ..model.program import HeapWorkspace, WorkerOp, Workspace
from ..shields.base import Shield
from .worker_client import CheckedReply, WorkerClient
from .workers import Workers

logger = logging.getLogger("llama_split")

not_compiled: Any = torch.compiler.disable(reason="it asks another process")  # type: ignore[no-untyped-call]
"""Decorates what torch.compile leaves alone: it breaks its graph there."""

_ARENA_SHARE = 4
"""A tensor may take one part in this many of the arena; larger ones cross in several calls."""


class ArenaWorkspace:
    """A ``Workspace`` in the request arena: what is written there crosses without a copy.

    Args:
        worker: whose arena it is.
        limit: the most elements that one call may carry; a larger tensor gets ordinary memory, since it is sent in
            chunks.
    """

    def __init__(self, worker: WorkerClient, limit: int) -> None:
        self._worker = worker
        self._limit = limit

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        if torch.Size(shape).numel() > self._limit:
            return torch.empty(tuple(shape), dtype=self._worker.wire)
        return self._worker.empty(shape)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.empty(tensor.shape).copy_(tensor)


class _PrivateWorkspace(HeapWorkspace):
    """A ``Workspace`` in ordinary memory, in the dtype that a shield takes."""

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype).contiguous()


class _Extent(NamedTuple):
    """The result's shape, how many rows (of the first two dimensions) cross, and the widest tensor's elements a row."""

    result: tuple[int, ...]
    rows: int
    width: int


@lru_cache(maxsize=4096)  # the same few shapes come with every token
def _extent_of(operation: Operation, shapes: tuple[tuple[int, ...], ...], geometry: Geometry) -> _Extent:
    result = operation.result.shape(sizes_of(operation, shapes, geometry))
    width = max(math.prod(shape[2:]) for shape in (*shapes, result))
    return _Extent(result, result[0] * result[1], width)


class Offload:
    """Executes each operation on the worker that holds its weights.

    Where tensors are too large for the arenas, an operation is split into several calls: rows of the first two
    dimensions, tokens or heads, are independent of each other.

    Args:
        workers: who computes.
        arena_bytes: the size of each direction's arena, of each worker.
        in_flight: how many operations may be in flight at once at a worker; they share its arenas.
        shield: what stands between the model and the workers. Default: nothing.
        compute: the model's dtype, in which a shield takes arguments that cross in a dtype of its own.
    """

    def __init__(
        self,
        workers: Workers,
        arena_bytes: int,
        in_flight: int = 1,
        shield: Shield | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        self._workers = workers
        self.shield = shield
        self._argument_dtype = workers.wire if shield is None or shield.crosses is None else compute
        self._limit = arena_bytes // (_ARENA_SHARE * in_flight * workers.wire.itemsize)
        spaces: dict[WorkerClient, Workspace] = {worker: self._workspace_of(worker) for worker in workers}
        self.workspaces = [spaces[workers.of_layer(index)] for index in range(workers.geometry.layers)]
        self.last_workspace = spaces[workers.last]

    def _workspace_of(self, worker: WorkerClient) -> Workspace:
        """Where arguments are written; with a shield not into the arena, where the worker could change them."""
        if self.shield is not None:
            return _PrivateWorkspace(torch.device("cpu"), self._argument_dtype)
        return ArenaWorkspace(worker, self._limit)

    def settle(self) -> None:
        """Finish what the shield has put off; called before anything that was computed from results is shown.

        Raises:
            WorkerTampered: a result was wrong.
        """
        if self.shield is not None:
            self.shield.settle()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """What a forward runs in: if it fails, what the shield has put off is finished all the same.

        Raises:
            WorkerTampered: a result was wrong.
        """
        try:
            yield
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Have the shield finish a forward that has failed with this error, which only tampering replaces."""
        if self.shield is None:
            return
        try:
            self.shield.give_up()
        except WorkerTampered:
            if not isinstance(error, WorkerTampered):
                raise
        except Exception:
            logger.exception("the shield %s failed after a forward that had failed", self.shield.name)

    def execute(self, op: WorkerOp) -> torch.Tensor:
        """Execute one operation, in one call or several."""
        if self.shield is None:
            return self._execute(op)
        return self.begin(op)()

    def _execute(self, op: WorkerOp) -> torch.Tensor:
        extent = self._extent(op)
        if extent.rows * extent.width > self._limit:
            return self._execute_in_chunks(op, extent)
        return self._workers.of(op).execute(op.operation, op.arguments, extent.result, **self._keywords(op))

    def begin(self, op: WorkerOp) -> Callable[[], torch.Tensor]:
        """Begin an operation, and return the function that waits for its result.

        That function executes the operation itself where the arenas have no room beside others, or the worker has died.
        """
        if self.shield is None:
            return self._begin(op)
        shield, covered = self.shield, self.shield.cover(op)
        wait = self._begin(covered.op)

        def finish() -> torch.Tensor:
            shield.work()
            return covered.uncover(wait())

        return finish

    def _begin(self, op: WorkerOp) -> Callable[[], torch.Tensor]:
        begun: list[CheckedReply] = []
        extent = self._extent(op)
        if extent.rows * extent.width <= self._limit:
            with contextlib.suppress(PeerDied, Closed):
                worker = self._workers.of(op)
                begun.append(worker.submit(op.operation, op.arguments, extent.result, **self._keywords(op)))

        def finish() -> torch.Tensor:
            if begun:
                with contextlib.suppress(PeerDied, Closed):
                    return begun.pop().result()  # in no variable: an error's traceback would hold it, and it the error
            return self._execute(op)

        return finish

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Look up embeddings: [B, T, D] in the wire's dtype."""
        return self.execute(WorkerOp(EMBED, 0, (ids_BT,)))

    def lm_head(self, hidden_BND: torch.Tensor) -> torch.Tensor:
        """Compute logits: [B, N, V] in the wire's dtype."""
        logits_BNV = self.execute(WorkerOp(LM_HEAD, 0, (hidden_BND,)))
        self.settle()
        return logits_BNV

    def rows_per_call(self, width: int) -> int:
        """The most rows of ``width`` elements that one call may carry; at least one."""
        return max(self._limit // width, 1)

    def _execute_in_chunks(self, op: WorkerOp, extent: _Extent) -> torch.Tensor:
        worker = self._workers.of(op)
        result = torch.empty(extent.result, dtype=worker.wire)
        whole = result.view(1, extent.rows, *extent.result[2:])
        first, *others = (argument.reshape(1, extent.rows, *argument.shape[2:]) for argument in op.arguments)
        rows_a_call = self.rows_per_call(extent.width)
        # A row that is too large by itself, as of attention scores, is split by the tokens of the first argument.
        tokens = whole.shape[2] if whole.dim() > 3 else 1
        tokens_a_call = tokens if extent.width <= self._limit else max(tokens * self._limit // extent.width, 1)
        keywords = self._keywords(op)
        for row in range(0, extent.rows, rows_a_call):
            rows = slice(row, row + rows_a_call)
            for token in range(0, tokens, tokens_a_call):
                some = slice(token, token + tokens_a_call)
                argument = first[:, rows, some] if first.dim() > 3 else first[:, rows]
                target = whole[:, rows, some] if whole.dim() > 3 else whole[:, rows]
                arguments = (argument, *(other[:, rows] for other in others))
                target.copy_(worker.execute(op.operation, arguments, target.shape, **keywords))
        return result

    def _extent(self, op: WorkerOp) -> _Extent:
        return _extent_of(op.operation, tuple([argument.shape for argument in op.arguments]), self._workers.geometry)

    def _keywords(self, op: WorkerOp) -> dict[str, Any]:
        """What goes along with the tensors."""
        if op.operation is EMBED:
            return {"dtype": DTYPE_NAMES[self._workers.wire]}
        return {"layer": op.layer} if op.operation.per_layer else {}
