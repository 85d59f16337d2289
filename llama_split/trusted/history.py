"""The input of forwards, and the record of it from which a worker's KV can be rebuilt.

Shape suffixes: B batch, T tokens of one forward, S all tokens cached after it, D hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class ForwardInput(NamedTuple):
    """The tokens of a forward and what goes along with them.

    Attributes:
        source: token ids [B, T], or embeddings [B, T, D] if the caller passed these.
        positions: [1 or B, T].
        mask: boolean [B, S], false where a token is padding; where this side attends, also one of four dimensions that
            the caller has prepared. None: every token counts.
        lengths: [T], the length of the text when each token was first processed; for models whose rotary frequencies
            depend on it.
        sequences: [B, S], the index of each token's text where several texts are packed into a row.
    """

    source: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    sequences: torch.Tensor | None = None

    def chunk(self, first: int, last: int, past: int) -> ForwardInput:
        """The tokens from ``first`` up to, but not including, ``last``.

        Args:
            first: index of the first token.
            last: index after the last token.
            past: how many tokens are cached before the forward.
        """
        return ForwardInput(
            self.source[:, first:last],
            self.positions[:, first:last],
            None if self.mask is None else self.mask[:, : past + last],
            None if self.lengths is None else self.lengths[first:last],
            None if self.sequences is None else self.sequences[:, : past + last],
        )

    def start(self) -> dict[str, Any]:
        """Everything but the source, by the names of ``Session.begin`` on the worker."""
        return {
            "positions": self.positions,
            "padding": self.mask,
            "lengths": self.lengths,
            "sequences": self.sequences,
        }


class History:
    """The input of all forwards that filled a cache, with crops and selections applied.

    What a token attended to is part of it: where a forward came with another mask for earlier tokens, the previous mask
    is kept for those tokens.
    """

    def __init__(self) -> None:
        self._sources: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._lengths: list[torch.Tensor] = []
        self._sequences: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._earlier: list[torch.Tensor] = []
        self._length = 0

    def append(self, tokens: ForwardInput) -> None:
        """Record one more forward."""
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
        for pieces, dim in ((self._sources, 1), (self._positions, 1), (self._lengths, 0)):
            excess = self._length - length if pieces else 0
            while excess > 0:  # from the end: what is cropped usually belongs to the last forward
                last = pieces.pop()
                if last.shape[dim] > excess:
                    pieces.append(last.narrow(dim, 0, last.shape[dim] - excess))
                excess -= last.shape[dim]
        self._length = length
        while self._earlier and self._earlier[-1].shape[1] >= length:
            self._mask = self._earlier.pop()
        self._mask = None if self._mask is None or length == 0 else self._mask[:, :length]
        self._sequences = None if self._sequences is None or length == 0 else self._sequences[:, :length]

    def select(self, rows: torch.Tensor) -> None:
        """Replace the batch by these rows of it."""
        self._join()
        for pieces in (self._sources, self._positions, self._earlier):
            pieces[:] = [piece[rows] for piece in pieces]
        self._mask = None if self._mask is None else self._mask[rows]
        self._sequences = None if self._sequences is None else self._sequences[rows]

    def copy(self) -> History:
        """An independent copy."""
        self._join()
        copied = History()
        copied._sources, copied._positions = self._sources[:], self._positions[:]
        copied._lengths, copied._earlier = self._lengths[:], self._earlier[:]
        copied._sequences, copied._mask, copied._length = self._sequences, self._mask, self._length
        return copied

    def sources(self) -> list[torch.Tensor]:
        """The sources in order; some may be ids and others embeddings."""
        self._join()
        return self._sources

    def runs(self, hidden_BSD: torch.Tensor) -> Iterator[tuple[int, ForwardInput]]:
        """Split all tokens into runs that share a mask; yields how many tokens precede each run, and the run.

        ``hidden_BSD`` are the embeddings of all tokens; a run's source is its part of them.
        """
        self._join()
        if self._mask is None:
            return
        whole = ForwardInput(
            hidden_BSD, self._positions[0], None, self._lengths[0] if self._lengths else None, self._sequences
        )
        first = 0
        for mask in (*self._earlier, self._mask):
            last = mask.shape[1]
            yield first, whole.chunk(first, last, 0)._replace(mask=mask)
            first = last

    def _join(self) -> None:
        """Join the pieces of successive forwards, so that edits take no longer after many forwards."""
        runs = itertools.groupby(self._sources, key=torch.Tensor.dim)
        self._sources = [torch.cat(list(pieces), dim=1) for _, pieces in runs]
        self._positions = [torch.cat(self._positions, dim=1)] if self._positions else []
        self._lengths = [torch.cat(self._lengths)] if self._lengths else []
