"""Hides from workers what they multiply with, by one-time pads over whole numbers, and checks what they return.

The method is that of F. Tramèr and D. Boneh, "Slalom" (arXiv 1806.03287). Each argument is quantised to whole numbers z
(``model.integers``) and sent as z + r modulo 2³², with a mask r that is used once (``masks``). The worker returns Q·(z
+ r) modulo 2³², and this side subtracts the term Q·r, which a dealer has computed. What crosses to the worker is
uniform, whatever z is. The result is exact, so that it can be tested in prime fields (``prime_field``) instead of
against a threshold.

Rules that it keeps: masks are taken before anything is sent, and each goes with one argument; where a call is repeated,
to another worker too, the same numbers are sent. A result is copied out of the worker's reach when the term is
subtracted. It is tested later (``put_off``), before anything that was computed from it is shown.

Shape suffixes: B batch, T tokens, N rows (B × T), k input width, m output width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ..boundary.operations import REVEALED_UNDER_MASKS, Mode
from ..checkpoint import Checkpoint, Progress
from ..checkpoint.matrices import MatrixKey, matrix_name
from ..checkpoint.quantised import QuantisedCheckpoint
from ..errors import LlamaSplitError, WorkerTampered
from ..model.integers import dequantise, greatest_norm, levels_for, quantise_tokens
from ..model.program import WorkerOp
from .base import MASKED, NEITHER, Covered, Shield, belongs_to_another, is_linear
from .dealer import DealtMasks, FileMasks
from .masks import Taken
from .prime_field import BOUND, FieldSecret, FieldTest
from .put_off import PutOff

AHEAD_TOKENS = 128
"""How many tokens' masks are dealt at a time where no file has any."""


_BLOCK_NUMBERS = 1 << 18


class Masks(Protocol):
    """Where masks come from."""

    def take(self, matrix: MatrixKey, rows: int) -> Taken:
        """Masks that were never handed out before, for this many rows.

        Raises:
            MasksExhausted: there are fewer.
        """

    @property
    def left(self) -> int:
        """How many tokens there are masks for."""

    def level(self) -> None:
        """After a forward that has failed: use up the masks that only some matrices have used."""

    def close(self) -> None:
        """Wipe what is left in memory, and close the file if there is one."""


@dataclass(frozen=True)
class _Matrix:
    """What is kept of one matrix, in place of its weights."""

    levels: int
    scale_m: torch.Tensor
    bias_m: torch.Tensor | None
    secret: FieldSecret


class _Product(NamedTuple):
    """A product whose check is put off."""

    matrix: MatrixKey
    z_Nk: torch.Tensor
    y_Nm: torch.Tensor


class OtpShield(Shield):
    """Masks and verifies the products of a split in mode fused; workers compute in int8.

    Args:
        masks: a file that ``llama-split deal`` has made. None: this process deals masks itself.
        ahead: how many tokens' masks it deals at a time then.
    """

    name = "otp"
    modes = (Mode.FUSED,)
    computes = torch.int8
    crosses = torch.int32
    reveals = REVEALED_UNDER_MASKS

    def __init__(self, masks: str | os.PathLike[str] | None = None, ahead: int = AHEAD_TOKENS) -> None:
        super().__init__()
        self._path = None if masks is None else Path(masks)
        self._ahead = ahead
        self._compute = torch.float32
        self._test = FieldTest()
        self._matrices: dict[MatrixKey, _Matrix] = {}
        self._masks: Masks | None = None
        self._put_off = PutOff(self._check, self._check_together)

    def load(
        self, checkpoint: Checkpoint, compute: torch.dtype, wire: torch.dtype, progress: Progress | None = None
    ) -> None:
        if self._matrices:
            raise belongs_to_another()
        self._compute = compute
        weights = QuantisedCheckpoint(checkpoint)
        with contextlib.ExitStack() as undo:
            if self._path is None:
                masks: Masks = DealtMasks(weights, self._ahead)
            else:
                masks = FileMasks(self._path, checkpoint, weights)
            undo.callback(masks.close)
            matrices: dict[MatrixKey, _Matrix] = {}
            for done, matrix in enumerate(weights.widths, start=1):
                matrices[matrix] = self._matrix(weights, matrix)
                if progress is not None:
                    progress(done, len(weights.widths))
            if isinstance(masks, DealtMasks):
                masks.deal_ahead(self._ahead, self._ahead, progress)
            undo.pop_all()
        self._masks, self._matrices = masks, matrices

    def cover(self, op: WorkerOp) -> Covered:
        if self._masks is None:
            raise RuntimeError("a shield is loaded before it is used")
        self.count(op)
        (argument_BTk,) = op.arguments
        matrix = self._matrices[op.operation, op.layer]
        rows = argument_BTk.shape[0] * argument_BTk.shape[1]
        z_Nk, scale_N = quantise_tokens(argument_BTk.reshape(rows, -1), matrix.levels)
        taken = self._masks.take((op.operation, op.layer), rows)
        sent_Nk = taken.mask_Nk.add_(z_Nk)  # the mask itself is in memory no longer

        def uncover(result_BTm: torch.Tensor) -> torch.Tensor:
            y_Nm = result_BTm.reshape(rows, -1) - taken.term_Nm
            taken.term_Nm.zero_()
            self._put_off.add(_Product((op.operation, op.layer), z_Nk, y_Nm), op.operation, rows)
            product_Nm = dequantise(y_Nm, scale_N, matrix.scale_m, matrix.bias_m)
            return product_Nm.to(self._compute).view(*result_BTm.shape)

        return Covered(op._replace(arguments=(sent_Nk.view(argument_BTk.shape),)), uncover)

    def work(self) -> None:
        self._put_off.work()

    def settle(self) -> None:
        self._put_off.settle()

    def give_up(self) -> None:
        try:
            self.settle()
        finally:
            if self._masks is not None:
                self._masks.level()

    def _check(self, product: _Product) -> None:
        """Check many rows of one product, in blocks that stay in the processor's cache."""
        secret = self._matrices[product.matrix].secret
        step = max(1, _BLOCK_NUMBERS // product.y_Nm.shape[1])
        for start in range(0, len(product.y_Nm), step):
            rows = slice(start, start + step)
            if not self._test.is_right(secret, product.z_Nk[rows], product.y_Nm[rows]):
                raise _tampered(product.matrix)

    def _check_together(self, several: list[_Product]) -> None:
        """Check products of one operation and as many rows each, of several layers."""
        secrets = [self._matrices[product.matrix].secret for product in several]
        z_LNk = torch.stack([product.z_Nk for product in several])
        y_LNm = torch.stack([product.y_Nm for product in several])
        of_all = FieldSecret(
            torch.stack([secret.s_mP for secret in secrets]), torch.stack([secret.c_kP for secret in secrets])
        )
        if not self._test.is_right(of_all, z_LNk, y_LNm):
            for product in several:
                self._check(product)

    def treatment(self, operation: str) -> str:
        return MASKED if is_linear(operation) else NEITHER

    @property
    def bound(self) -> str:
        return (
            "what the worker is sent is uniform, by the key stream of AES-256, and no mask is used twice; a wrong row "
            f"is accepted with a probability below {BOUND}"
        )

    @property
    def tokens_left(self) -> int:
        """How many tokens there are masks for, before more have to be dealt."""
        return 0 if self._masks is None else self._masks.left

    def deal_ahead(self, tokens: int, logits: int) -> None:
        """Deal now, for example while nothing is asked for, until there are masks for this many tokens and logits.

        Raises:
            LlamaSplitError: the masks come from a file.
        """
        if not isinstance(self._masks, DealtMasks):
            raise LlamaSplitError("the masks come from a file: deal another file with `llama-split deal`")
        self._masks.deal_ahead(tokens, logits)

    def close(self) -> None:
        if self._masks is not None:
            self._masks.close()

    def _matrix(self, weights: QuantisedCheckpoint, matrix: MatrixKey) -> _Matrix:
        """Prepare for a matrix in one pass."""
        norm, scales = 0, []

        def quantised() -> Iterator[torch.Tensor]:
            nonlocal norm
            for block in weights.blocks(matrix):
                norm = max(norm, greatest_norm(block.quantised_mk))
                scales.append(block.scale_m)
                yield block.quantised_mk

        secret = self._test.secret_of(quantised())
        return _Matrix(levels_for(norm), torch.cat(scales), weights.bias(matrix), secret)


def _tampered(matrix: MatrixKey) -> WorkerTampered:
    return WorkerTampered(
        f"the worker returned a wrong result of {matrix_name(matrix)}, where nothing is rounded. It is hostile, "
        "computes wrongly, or holds other weights; or the masks are damaged"
    )
