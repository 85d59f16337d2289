"""Sessions whose tokens come in one row, one session after the other: what continuous batching asks for.

Linear operations take all tokens together. Each session attends by itself, over its own KV, so that a request gets what
it would get alone.

Shape suffixes: B batch (here 1), T tokens of all sessions, D hidden, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..model.attention import Attention, AttentiveLayer, QueryKeyValue
from ..model.decoder import AttentionContext
from ..model.program import Program, Workspace
from .sessions import Session


class Batch:
    """Sessions of one client that go through a forward together; used as a ``Session`` is.

    Args:
        sessions: in the order of their tokens.

    Raises:
        ValueError: there is none, or one of them comes twice.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        if not sessions or len({id(session) for session in sessions}) < len(sessions):
            raise ValueError(f"a batch of {len(sessions)} sessions needs one or more, each of them once")
        self._sessions = sessions
        self._cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(
        self,
        hidden_BTD: torch.Tensor,
        positions: torch.Tensor,
        tokens: list[int],
        past: list[int],
        reserve: int = 0,
        lengths: torch.Tensor | None = None,
    ) -> None:
        """Start a forward of all sessions. The arguments are those of ``Session.begin``.

        Args:
            hidden_BTD: the embeddings, [1, T, D].
            positions: [1, T] int64.
            tokens: how many of the tokens each session has.
            past: for each session, how many cached tokens the forward continues.
            reserve: how many tokens each session is expected to have in the end.
            lengths: [T] int64.

        Raises:
            ValueError: the arguments don't fit each other or a session's cache.
            SessionLost: a session has fewer than its ``past`` tokens.
            SessionLimit: there is no room for the KV.
        """
        total = hidden_BTD.shape[1]
        counts = [count for count in tokens if type(count) is int and count > 0]
        if len(counts) != len(self._sessions) or sum(counts) != total or len(past) != len(counts):
            raise ValueError(
                f"{len(tokens)} numbers of tokens and {len(past)} of past ones don't describe {len(self._sessions)} "
                f"sessions with {total} tokens in all"
            )
        if hidden_BTD.shape[0] != 1 or positions.shape != (1, total) or (lengths is not None and len(lengths) != total):
            raise ValueError(f"a batch of sessions has its tokens in one row, with {total} positions and lengths")
        for session, (first, end), cached in zip(self._sessions, pairwise([0, *accumulate(counts)]), past, strict=True):
            session.begin(
                hidden_BTD[:, first:end],
                positions[:, first:end],
                None,
                cached,
                None,
                reserve,
                None if lengths is None else lengths[first:end],
            )

    def enter(self, index: int) -> AttentionContext:
        """Return the context for a layer, as ``Session.enter`` does for one session."""
        contexts = [session.enter(index) for session in self._sessions]
        if self._cos_sin is None:
            cos, sin = zip(*(context.cos_sin for context in contexts), strict=True)
            self._cos_sin = torch.cat(cos, dim=1), torch.cat(sin, dim=1)
        return AttentionContext(self._cos_sin, None, None, _EachByItself(contexts))


class _EachByItself(Attention):
    """Each session's tokens attend to what its own cache holds."""

    def __init__(self, contexts: Sequence[AttentionContext]) -> None:
        super().__init__()
        self._contexts = contexts

    def program(self, layer: AttentiveLayer, heads: QueryKeyValue, mask: Any, workspace: Workspace) -> Program:
        query_BHTd, key_BGTd, value_BGTd = heads
        attended_BTHd = []
        first = 0
        for context in self._contexts:
            end = first + context.cos_sin[0].shape[1]
            some = slice(first, end)
            key, value = key_BGTd[:, :, some], value_BGTd[:, :, some]
            if context.cache is not None:
                key, value = context.cache.update(key, value, layer.index)
            own = QueryKeyValue(query_BHTd[:, :, some], key, value)
            attended_BTHd.append((yield from context.attention.program(layer, own, context.mask, workspace)))
            first = end
        return torch.cat(attended_BTHd, dim=1)
