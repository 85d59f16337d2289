"""The dealer: computes the terms of masks, many at a time, in one pass over the weights that holds a matrix at a time.

Only a trusted machine may deal: the masks and their terms undo each other.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, Progress
from ..checkpoint.matrices import MatrixKey
from ..checkpoint.quantised import QuantisedCheckpoint, Widths
from ..errors import MasksExhausted
from ..model.integers import multiply_exactly
from .idle import GoOn, IdleWork, never_asked
from .mask_pool import BLOCK_ROWS
from .masks import CLOSED, MaskStore, Taken, check_process

logger = logging.getLogger("llama_split")

_AT_ONCE = 64 * BLOCK_ROWS
_COLUMNS = 4096  # of a product: a fraction of a second's work


def deal(
    store: MaskStore, weights: QuantisedCheckpoint, progress: Progress | None = None, go_on: GoOn = never_asked
) -> None:
    """Fill an empty store.

    Args:
        store: where the keys are drawn and the terms written.
        weights: of the model that the store is for.
        progress: called with how many matrices are done, of how many.
        go_on: called between the steps, to raise what is to end this.
    """
    store.draw_keys()
    for done, matrix in enumerate(store.widths, start=1):
        terms = store.terms(matrix)
        blocks = []
        for block in weights.blocks(matrix):
            blocks.append(block.quantised_mk)
            go_on()
        quantised_mk = torch.cat(blocks)
        for first in range(0, len(terms), _AT_ONCE):
            rows = slice(first, min(first + _AT_ONCE, len(terms)))
            masks = store.masks(matrix, rows.start, rows.stop)
            for column in range(0, len(quantised_mk), _COLUMNS):
                columns = slice(column, column + _COLUMNS)
                terms[rows, columns] = multiply_exactly(masks, quantised_mk[columns])
                go_on()
        if progress is not None:
            progress(done, len(store.widths))


def deal_file(checkpoint: Checkpoint, path: Path, tokens: int, logits: int, progress: Progress | None = None) -> int:
    """Deal masks into a new file, which one process at a time can use.

    Args:
        checkpoint: the model.
        path: of the file.
        tokens: how many tokens can go through the layers.
        logits: how many tokens' logits can be computed.
        progress: called with how many matrices are done, of how many.

    Returns:
        The file's size in bytes.

    Raises:
        LlamaSplitError: the file exists, or there is no room for it.
    """
    weights = QuantisedCheckpoint(checkpoint)
    with MaskStore.in_file(path, checkpoint.fingerprint(), weights.widths, tokens, logits) as store:
        deal(store, weights, progress)
    return path.stat().st_size


class FileMasks:
    """Hands out the masks of a file, and raises ``MasksExhausted`` when there are no more.

    Args:
        path: of a file that ``deal_file`` has made.
        checkpoint: the model.
        weights: its matrices.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, weights: QuantisedCheckpoint) -> None:
        self._store = MaskStore.open(path, checkpoint.fingerprint(), weights.widths)

    @property
    def left(self) -> int:
        """How many tokens there are masks for."""
        return self._store.left

    def take(self, matrix: MatrixKey, rows: int) -> Taken:
        """Masks for this many rows."""
        return self._store.take(matrix, rows)

    def level(self) -> None:
        """After a forward that has failed: use up the masks that only some matrices have used."""
        self._store.level()

    def close(self) -> None:
        """Close the file."""
        self._store.close()


class DealtMasks:
    """Hands out masks that this process deals itself: some ahead, and more in pauses, or when they are used up.

    Args:
        weights: the model's matrices.
        ahead: how many tokens' masks are kept in store, and dealt at a time, at least; more where more are needed at
            once.
    """

    def __init__(self, weights: QuantisedCheckpoint, ahead: int) -> None:
        self._ahead = ahead
        layers = {matrix: widths for matrix, widths in weights.widths.items() if matrix[0].per_layer}
        head = {matrix: widths for matrix, widths in weights.widths.items() if not matrix[0].per_layer}
        dealing = threading.Lock()
        self._layers, self._head = _Supply(weights, layers, dealing), _Supply(weights, head, dealing)
        self._idle = IdleWork(self, DealtMasks._deal_in_a_pause, "dealing masks in pauses")

    def deal_ahead(self, tokens: int, logits: int, progress: Progress | None = None) -> None:
        """Deal until masks for this many tokens, and for the logits of this many, are in store."""
        self._idle.ask()
        self._layers.fill(tokens, progress)
        self._head.fill(logits)

    def _deal_in_a_pause(self, go_on: GoOn) -> None:
        self._layers.fill(self._ahead, None, go_on)
        self._head.fill(self._ahead, None, go_on)

    @property
    def left(self) -> int:
        """How many tokens there are masks for."""
        return self._layers.left

    def take(self, matrix: MatrixKey, rows: int) -> Taken:
        """Masks for this many rows; deals more if there are fewer."""
        self._idle.ask()
        supply = self._layers if matrix[0].per_layer else self._head
        return supply.take(matrix, rows, self._ahead)

    def level(self) -> None:
        """After a forward that has failed: use up the masks that only some matrices have used."""
        self._layers.level()

    def close(self) -> None:
        """Wipe what is left."""
        self._idle.close()
        self._layers.close()
        self._head.close()


class _Supply:
    """The masks of some matrices, in stores that are used one after the other.

    Args:
        weights: the model's matrices.
        widths: of those matrices.
        dealing: held while weights are read.

    A garbage collection in the middle of anything may close it: so its own lock may be taken again by the same thread.
    """

    def __init__(
        self, weights: QuantisedCheckpoint, widths: Mapping[MatrixKey, Widths], dealing: threading.Lock
    ) -> None:
        self._weights = weights
        self._widths = widths
        self._dealing = dealing
        self._stores: deque[MaskStore] = deque()
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._closed = False

    @property
    def left(self) -> int:
        return sum(store.left for store in tuple(self._stores))

    def fill(self, rows: int, progress: Progress | None = None, go_on: GoOn = never_asked) -> None:
        check_process(self._process)
        self._check_open()
        with self._dealing:
            missing = rows - self.left
            if missing > 0:
                self._deal(missing, progress, go_on)  # masks can be taken meanwhile

    def take(self, matrix: MatrixKey, rows: int, ahead: int) -> Taken:
        check_process(self._process)
        parts = self._in_store(matrix, rows)
        while (missing := rows - _rows_of(parts)) > 0:
            with self._dealing:
                parts += self._in_store(matrix, missing)  # what was dealt while this waited
                missing = rows - _rows_of(parts)
                if missing > 0:
                    self._deal(max(missing, ahead))
        return functools.reduce(Taken.join, (part for part in parts if len(part.mask_Nk)))

    def _in_store(self, matrix: MatrixKey, rows: int) -> list[Taken]:
        """As many masks as there are, up to this many rows."""
        with self._lock:
            self._check_open()
            parts: list[Taken] = []
            for store in self._stores:
                parts.append(store.take(matrix, rows, partly=True))
                rows -= len(parts[-1].mask_Nk)
            self._drop_used()
            return parts

    def level(self) -> None:
        if os.getpid() != self._process:
            return
        with self._lock:
            for store in self._stores:
                store.level()
            self._drop_used()

    def close(self) -> None:
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            while self._stores:
                self._stores.popleft().close()

    def _check_open(self) -> None:
        if self._closed:
            raise MasksExhausted(CLOSED)

    def _drop_used(self) -> None:
        while self._stores and self._stores[0].is_used_up:
            self._stores.popleft().close()

    def _deal(self, rows: int, progress: Progress | None = None, go_on: GoOn = never_asked) -> None:
        """Add a store; ``_dealing`` is held."""
        started = time.monotonic()
        store = MaskStore.in_memory(self._widths, rows)
        try:
            deal(store, self._weights, progress, go_on)
            with self._lock:
                self._check_open()
                self._stores.append(store)
        except BaseException:
            store.close()
            raise
        taken_s = time.monotonic() - started
        logger.info("dealt %d masks for each of %d matrices in %.2f s", rows, len(self._widths), taken_s)


def _rows_of(parts: Iterable[Taken]) -> int:
    return sum(len(part.mask_Nk) for part in parts)
