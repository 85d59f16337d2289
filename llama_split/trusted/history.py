"""What forwards went over, kept so that a worker's KV can be built again.

Shape suffixes: B batch, T tokens of one forward, S all tokens that are cached then, D hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Tokens(NamedTuple):
    """What a forward goes over: token ids [B, T], or embeddings [B, T, D] where the caller passed these.

    ``positions`` are [1 or B, T]. ``mask``, if any, is over all that is cached afterwards: boolean [B, S], false where
    a token is padding; where attention is this side's, also of four dimensions, as the caller prepared it.
    ``sequences``, if texts are packed into a row, says which one each token is of, [B, S]. ``lengths`` [T], for
    models whose rotary frequencies depend on it, is the length of the text that each token was first part of.
    """

    source: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    sequences: torch.Tensor | None = None

    def cut(self, first: int, last: int, past: int) -> Tokens:
        """Those from ``first`` up to ``last``, of a forward that begins after ``past`` cached ones."""
        return Tokens(
            self.source[:, first:last],
            self.positions[:, first:last],
            None if self.mask is None else self.mask[:, : past + last],
            None if self.lengths is None else self.lengths[first:last],
            None if self.sequences is None else self.sequences[:, : past + last],
        )

    def start(self) -> dict[str, Any]:
        """All but the source, as the worker takes it."""
        return {
            "positions": self.positions,
            "padding": self.mask,
            "lengths": self.lengths,
            "sequences": self.sequences,
        }


class History:
    """All that went through the forwards that filled a cache, with crops and selections applied.

    What a token attended to is part of it: where a forward came with another mask for earlier tokens than they had, the
    mask until then is kept for the tokens until then.
    """

    def __init__(self) -> None:
        self._sources: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._lengths: list[torch.Tensor] = []
        self._sequences: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._earlier: list[torch.Tensor] = []
        self._length = 0

    def append(self, tokens: Tokens) -> None:
        """One more forward."""
        batch, count = tokens.source.shape[:2]
        self._sources.append(tokens.source.clone())
        self._positions.append(tokens.positions.expand(batch, count).clone())
        if tokens.lengths is not None:
            self._lengths.append(tokens.lengths.clone())
        self._sequences = None if tokens.sequences is None else tokens.sequences.clone()
        before, self._length = self._length, self._length + count
        mask = torch.ones(batch, self._length, dtype=torch.bool) if tokens.mask is None else tokens.mask
        if self._mask is not None and not torch.equal(self._mask, mask[:, :before]):
            self._earlier.append(self._mask)
        self._mask = mask.clone()

    def crop(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        for parts, dim in ((self._sources, 1), (self._positions, 1), (self._lengths, 0)):
            excess = self._length - length if parts else 0
            while excess > 0:  # from the end: what is cropped is usually of the last forward
                last = parts.pop()
                if last.shape[dim] > excess:
                    parts.append(last.narrow(dim, 0, last.shape[dim] - excess))
                excess -= last.shape[dim]
        self._length = length
        while self._earlier and self._earlier[-1].shape[1] >= length:
            self._mask = self._earlier.pop()
        self._mask = None if self._mask is None or length == 0 else self._mask[:, :length]
        self._sequences = None if self._sequences is None or length == 0 else self._sequences[:, :length]

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch."""
        self._join()
        for parts in (self._sources, self._positions, self._earlier):
            parts[:] = [part[rows] for part in parts]
        self._mask = None if self._mask is None else self._mask[rows]
        self._sequences = None if self._sequences is None else self._sequences[rows]

    def copy(self) -> History:
        """One that goes on alone."""
        self._join()
        copied = History()
        copied._sources, copied._positions = self._sources[:], self._positions[:]
        copied._lengths, copied._earlier = self._lengths[:], self._earlier[:]
        copied._sequences, copied._mask, copied._length = self._sequences, self._mask, self._length
        return copied

    def sources(self) -> list[torch.Tensor]:
        """Ids and embeddings, in order; of both there may be some."""
        self._join()
        return self._sources

    def runs(self, hidden_BSD: torch.Tensor) -> Iterator[tuple[int, Tokens]]:
        """All tokens, by their embeddings, in runs that can go through together: how many are before it, and a run."""
        self._join()
        if self._mask is None:
            return
        whole = Tokens(
            hidden_BSD, self._positions[0], None, self._lengths[0] if self._lengths else None, self._sequences
        )
        first = 0
        for mask in (*self._earlier, self._mask):
            last = mask.shape[1]
            yield first, whole.cut(first, last, 0)._replace(mask=mask)
            first = last

    def _join(self) -> None:
        """Make one part of each run of parts, so that what edits them takes no longer for many forwards."""
        runs = itertools.groupby(self._sources, key=torch.Tensor.dim)
        self._sources = [torch.cat(list(parts), dim=1) for _, parts in runs]
        self._positions = [torch.cat(self._positions, dim=1)] if self._positions else []
        self._lengths = [torch.cat(self._lengths)] if self._lengths else []
