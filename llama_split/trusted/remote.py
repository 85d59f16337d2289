"""The trusted side of the boundary: sends steps to the worker.

Shape suffixes: B batch, T tokens, D hidden, R rows (batch × tokens), W an operation's width.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from shmtransport import Client, LocalProtocolError, RemoteError, Statistics, TransportError

from ..checkpoint import Checkpoint
from ..config import DTYPE_NAMES
from ..decoder import Step
from ..errors import UnsupportedBySplit, WorkerMismatch
from ..operations import LAYER, LM_HEAD, STACK, Operation
from .cache import RemoteCache

_END_TIMEOUT_S = 5.0
_ARENA_SHARE = 4  # one call's tensor takes at most this part of an arena; longer ones cross in several calls


class Part(NamedTuple):
    """A forward's tokens ``first`` to ``last``: their hidden states [B, T, D], what the worker must know to start."""

    hidden: torch.Tensor
    first: int
    last: int
    start: dict[str, Any] | None


class Remote:
    """A connection to a worker that serves the same model.

    Raises:
        WorkerMismatch: it serves another one, or computes in another dtype.
        shmtransport.TransportError: no worker, or none that fits this transport.
    """

    def __init__(self, client: Client, checkpoint: Checkpoint, dtype: torch.dtype, arena_bytes: int) -> None:
        self.client = client
        self._geometry = checkpoint.geometry
        self._arena_bytes = arena_bytes
        self._dtype = dtype
        self._ended_sessions: deque[int] = deque()
        self._next_session = 0
        self._lock = threading.Lock()
        self._check(checkpoint)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor that will be sent; ordinary memory where it is too large to be sent in one piece."""
        rows, width = shape[0] * shape[1], shape[2]
        if rows > self._rows_per_call(width):
            return torch.empty(tuple(shape), dtype=dtype)
        return self.client.empty(shape, dtype)

    def perform(self, step: Step) -> torch.Tensor:
        """Make one step on the worker: one call, or several where the tensors don't fit the arenas together."""
        argument_BTW, operation = step.argument, step.operation
        widest = max(operation.input_width(self._geometry), operation.output_width(self._geometry))
        limit = self._rows_per_call(widest)
        if argument_BTW.shape[0] * argument_BTW.shape[1] <= limit:
            return self._call(operation, argument_BTW, layer=step.layer)
        rows_1RW = argument_BTW.reshape(1, -1, argument_BTW.shape[-1])
        parts = [self._call(operation, part, layer=step.layer).clone() for part in torch.split(rows_1RW, limit, dim=1)]
        return torch.cat(parts, dim=1).view(*argument_BTW.shape[:-1], -1)

    def lm_head(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of these positions."""
        return self.perform(Step(LM_HEAD, 0, hidden_BTD))

    def layers(
        self, hidden_BTD: torch.Tensor, cache: RemoteCache, positions: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """All decoder layers on the worker, one call each, over the session's KV.

        Raises:
            UnsupportedBySplit: the cache is another connection's.
        """

        def through(part: Part) -> torch.Tensor:
            part_BTD, start = part.hidden, part.start
            for index in range(self._geometry.layers):
                part_BTD = self._call(LAYER, part_BTD, layer=index, session=cache.session, start=start)
                start = None
            return part_BTD

        return self._in_parts(hidden_BTD, cache, positions, padding, hidden_BTD.shape[2], through)

    def stack(
        self,
        hidden_BTD: torch.Tensor,
        cache: RemoteCache,
        positions: torch.Tensor,
        padding: torch.Tensor | None,
        logits_of_last: int,
    ) -> torch.Tensor:
        """All layers, the final norm and the output matrix on the worker, in one call: the logits of the last tokens.

        ``logits_of_last`` is of how many, 0 for all of them.

        Raises:
            UnsupportedBySplit: the cache is another connection's.
        """
        batch, tokens, width = hidden_BTD.shape
        wanted = min(logits_of_last or tokens, tokens)

        def through(part: Part) -> torch.Tensor:
            keep = max(part.last - max(part.first, tokens - wanted), 0)
            rows = (batch, keep)
            return self._call(STACK, part.hidden, rows, session=cache.session, start=part.start, keep=keep)

        logits_fit = batch * wanted <= self._rows_per_call(self._geometry.vocab)
        widest = width if logits_fit else max(width, self._geometry.vocab)
        return self._in_parts(hidden_BTD, cache, positions, padding, widest, through)

    def _in_parts(
        self,
        hidden_BTD: torch.Tensor,
        cache: RemoteCache,
        positions: torch.Tensor,
        padding: torch.Tensor | None,
        widest: int,
        through: Callable[[Part], torch.Tensor],
    ) -> torch.Tensor:
        """A forward in as many parts as the arenas need; ``widest`` elements cross for each token at most."""
        if not cache.is_of(self._ended_sessions):
            raise UnsupportedBySplit("past_key_values belongs to another model's connection; its KV is not there")
        self.end_sessions()
        batch, tokens = hidden_BTD.shape[:2]
        past = cache.get_seq_length()
        limit = max(self._rows_per_call(widest) // batch, 1)
        results = []
        for first in range(0, tokens, limit):  # causal: later tokens change nothing for earlier ones
            last = min(first + limit, tokens)
            seen = None if padding is None else padding[:, : past + last]
            start = cache.start(positions[:, first:last], seen)
            result = through(Part(hidden_BTD[:, first:last], first, last, start))
            cache.advance(batch, last - first)
            # All but the last are copied out of the arena: the next part's results need the room.
            results.append(result if last == tokens else result.clone())
            del result
        return results[0] if len(results) == 1 else torch.cat(results, dim=1)

    def new_cache(self) -> RemoteCache:
        """A new session's cache; the session ends with it."""
        with self._lock:
            self._next_session += 1
            return RemoteCache(self._next_session, self._ended_sessions)

    def end_sessions(self) -> None:
        """Free the KV of sessions whose cache has died here; a worker that can't be asked does so in the end."""
        with contextlib.suppress(TransportError):
            while self._ended_sessions:
                pending = self.client.submit("end_session", self._ended_sessions.popleft())
                pending.result(timeout_s=_END_TIMEOUT_S)

    def statistics(self) -> Statistics:
        return self.client.statistics()

    def _call(
        self, operation: Operation, argument: torch.Tensor, rows: tuple[int, ...] | None = None, **keywords: Any
    ) -> torch.Tensor:
        """One call; whatever the worker returns is checked against the boundary's description before it is used.

        ``rows`` are the leading dimensions of the result; by default the argument's.
        """
        result = self.client.call(operation.name, argument, **keywords)
        expected = (*(argument.shape[:-1] if rows is None else rows), operation.output_width(self._geometry))
        if not isinstance(result, torch.Tensor) or result.shape != expected or result.dtype != self._dtype:
            found = (
                f"{list(result.shape)} of {result.dtype}" if isinstance(result, torch.Tensor) else type(result).__name__
            )
            raise WorkerMismatch(
                f"the worker at {self.client.address} answered {operation.name} with {found} where {list(expected)} of "
                f"{self._dtype} is due: it is broken or hostile"
            )
        return result

    def _rows_per_call(self, width: int) -> int:
        return max(self._arena_bytes // (_ARENA_SHARE * width * self._dtype.itemsize), 1)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Compare what the worker says of itself with this side's model."""
        address = self.client.address
        try:
            found = self.client.call("describe")
        except (LocalProtocolError, RemoteError) as error:
            raise WorkerMismatch(f"the server at {address} is no worker of llama-split: {error}") from error
        if not isinstance(found, dict) or not {"geometry", "fingerprint", "dtype"} <= found.keys():
            raise WorkerMismatch(f"the server at {address} does not describe itself as a worker of llama-split does")
        if found["geometry"] != repr(checkpoint.geometry):
            raise WorkerMismatch(
                f"the worker at {address} serves another model, {found['geometry']}; "
                f"this side has {checkpoint.geometry}: start it with the same --model"
            )
        if found["fingerprint"] != checkpoint.fingerprint():
            raise WorkerMismatch(
                f"the worker at {address} has a model of this shape but other weights: start it with the same --model"
            )
        wanted = DTYPE_NAMES[self._dtype]
        if found["dtype"] != wanted:
            raise WorkerMismatch(
                f"the worker at {address} computes in {found['dtype']}, this side in {wanted}: use one dtype on both"
            )
