"""The worker's side of the boundary: registers a handler for every operation with a server.

Results have the dtype of their arguments, which is the wire's and may differ from the one that the worker computes in.

Shape suffixes: B batch, T tokens, S tokens attended to, N tokens whose logits are asked for, H heads, d head_dim,
D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from shmtransport import Server

from ..boundary.compute import parse_dtype
from ..boundary.operations import EMBED, LAYER, LAYERS, MIX, SCORES, STACK
from ..checkpoint import Checkpoint
from ..model.program import HeapWorkspace, execute
from .batches import Batch
from .linear_service import LinearService
from .sessions import Session, SessionLimits, Sessions
from .weights import Weights, multiply


class Service(LinearService):
    """The handlers of one model, for all clients of one server.

    Args:
        server: where the handlers are registered.
        weights: the model's weights.
        checkpoint: describes the model to clients.
        limits: limits on sessions. None: the defaults.
    """

    def __init__(
        self, server: Server, weights: Weights, checkpoint: Checkpoint, limits: SessionLimits | None = None
    ) -> None:
        self._weights = weights
        self._workspace = HeapWorkspace(weights.device, weights.dtype)
        self.sessions = Sessions(weights, limits)
        super().__init__(
            server,
            weights,
            checkpoint,
            embedding=weights.embedding is not None,
            sessions=self.sessions.most_per_client,
        )
        server.register(EMBED.name, self._embed)
        server.register(SCORES.name, self._scores)
        server.register(MIX.name, self._mix)
        server.register(LAYER.name, self._layer)
        server.register(LAYERS.name, self._layers)
        server.register(STACK.name, self._stack)
        server.register("end_session", self._end_session)
        server.on_disconnect(self.sessions.end_connection)

    @torch.inference_mode()
    def _embed(self, ids_BT: torch.Tensor, *, dtype: str) -> torch.Tensor:
        """Rows of the embedding; ``dtype`` names the wire's dtype."""
        embedding, geometry = self._weights.embedding, self._weights.geometry
        if embedding is None:
            raise ValueError("this worker holds no embedding: start it with --embedding")
        sizes = EMBED.bind((ids_BT,), geometry)
        ids = ids_BT.flatten().clone()  # copied once: the client could change them after the check
        if ids.dtype != torch.int64 or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < geometry.vocab):
            raise ValueError(f"{EMBED.name} takes int64 token ids from 0 to {geometry.vocab - 1}")
        result = self._result(EMBED.result.shape(sizes), parse_dtype(dtype))
        rows = result.view(-1, geometry.hidden)
        if result.dtype == embedding.dtype:
            torch.index_select(embedding, 0, ids.to(embedding.device), out=rows)
        else:
            rows.copy_(embedding[ids.to(embedding.device)])
        return result

    @torch.inference_mode()
    def _scores(self, query_BHTd: torch.Tensor, key_BHSd: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
        """Queries times keys. Needs no weights of the model, so ``layer`` has no effect."""
        (query, key), result = self._bind(SCORES, query_BHTd, key_BHSd)
        return multiply(query, key.transpose(2, 3), result)

    @torch.inference_mode()
    def _mix(self, weights_BHTS: torch.Tensor, value_BHSd: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
        """Attention weights times values. Needs no weights of the model, so ``layer`` has no effect."""
        (weights, value), result = self._bind(MIX, weights_BHTS, value_BHSd)
        return multiply(weights, value, result)

    @torch.inference_mode()
    def _layer(
        self, hidden_BTD: torch.Tensor, *, layer: int, session: int | list[int], start: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """One decoder layer, of one session or of several.

        ``start``, the arguments of ``Session.begin`` or ``Batch.begin``, comes with a forward's first layer.
        """
        (mine_BTD,), result_BTD = self._bind(LAYER, hidden_BTD)
        position = self._weights.position(layer)
        opened = self._opened(session)
        if start is not None:
            opened.begin(mine_BTD, **start)
        return self._through(position, mine_BTD, opened, result_BTD)

    @torch.inference_mode()
    def _layers(self, hidden_BTD: torch.Tensor, *, session: int | list[int], start: dict[str, Any]) -> torch.Tensor:
        """All decoder layers of this worker, for the next worker's."""
        (mine_BTD,), result_BTD = self._bind(LAYERS, hidden_BTD)
        opened = self._opened(session)
        opened.begin(mine_BTD, **start)
        return self._through_all(mine_BTD, opened, result_BTD)

    @torch.inference_mode()
    def _stack(
        self, hidden_BTD: torch.Tensor, *, session: int | list[int], start: dict[str, Any], keep: int | list[int]
    ) -> torch.Tensor:
        """All decoder layers, the final norm, and the logits of some tokens of each row.

        ``keep`` is the number of last tokens, or a list of indices of tokens.
        """
        kept = _kept(keep, hidden_BTD.shape[1])
        head = self._weights.head
        (mine_BTD,), logits_BNV = self._bind(STACK, hidden_BTD, N=len(kept))
        opened = self._opened(session)
        opened.begin(mine_BTD, **start)
        mine_BTD = self._through_all(mine_BTD, opened)
        kept_BND = mine_BTD[:, kept.start : kept.stop] if isinstance(kept, range) else mine_BTD[:, kept]
        return head.linear(head.norm(kept_BND, self._workspace), logits_BNV)

    def _opened(self, session: int | list[int]) -> Session | Batch:
        """The client's session of this id, or those of a list of ids."""
        connection_id = self._server.connection_id
        if isinstance(session, list):
            return Batch([self.sessions.open(connection_id, each) for each in session])
        return self.sessions.open(connection_id, session)

    def _through_all(
        self, hidden_BTD: torch.Tensor, session: Session | Batch, result_BTD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All decoder layers of this worker: [B, T, D] to [B, T, D]."""
        *others, last = range(len(self._weights.layers))
        for position in others:
            hidden_BTD = self._through(position, hidden_BTD, session)
        return self._through(last, hidden_BTD, session, result_BTD)

    def _through(
        self, position: int, hidden_BTD: torch.Tensor, session: Session | Batch, result_BTD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One decoder layer of a session's forward: [B, T, D] to [B, T, D]."""
        layer = self._weights.layers[position]
        program = layer.program(hidden_BTD, session.enter(position), self._workspace, result_BTD)
        return execute(program, self._weights.execute)

    def _end_session(self, session_id: int) -> None:
        self.sessions.end(self._server.connection_id, session_id)


def _kept(keep: int | list[int], tokens: int) -> range | list[int]:
    """The indices of the tokens whose logits are wanted."""
    if type(keep) is int and 0 <= keep <= tokens:
        return range(tokens - keep, tokens)
    if isinstance(keep, list) and len(keep) <= tokens and all(type(row) is int and 0 <= row < tokens for row in keep):
        return keep
    raise ValueError(
        f"keep must be a whole number from 0 to the {tokens} tokens, or a list of up to {tokens} of their indices"
    )
