"""Checks every product of a worker by Freivalds' test, without repeating it.

For a matrix W with m rows and k columns, a secret vector s of m normally distributed numbers is drawn and c = sᵀW kept.
A result y for an argument x is right if s·y = c·x (+ s·b with a bias b): two dot products in place of m. Floating-point
numbers are not exact, so the two may differ by a threshold. Rows are checked independently.

The threshold. Let u be the unit roundoff of float32 (2⁻²⁴), in which products are accumulated, and e an honest worker's
error. In the model of N. J. Higham and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis" (SIAM J. Sci.
Comput. 41, 2019), where roundings are independent and 0 on average, the error of a dot product of length k deviates by
at most √k·u·|w|·|x|, whatever the order of summation (their theorem 2.4 bounds it by λ times that, except with
probability 2·exp(−λ²/2)). So ‖e‖₂ is about √k·u·‖W‖_F·‖x‖₂ at most, and since s is independent of e, s·e is normal with
that deviation. The two dot products here have errors of the same kind: their partial sums deviate by at most ‖W‖_F·‖x‖₂
and ‖y‖₂, which gives √k·u·‖W‖_F·‖x‖₂ for c·x, another u·‖W‖_F·‖x‖₂ since c is rounded, and √m·u·‖y‖₂ for s·y. A result
that is rounded to a dtype with unit roundoff v adds v·‖y‖₂. The threshold is λ = 6 times the sum of these: an honest
row is refused with a probability of 10⁻⁸ in this model.

What is caught. A result that is wrong by δ passes only if |s·δ| is within twice the threshold τ. Since s·δ is normal
with deviation ‖δ‖₂, that has a probability of at most √(2/π)·2τ/‖δ‖₂, for each repetition with another s. A worker
learns nothing of s but that its results were accepted: the first that is not ends the generation.

Rules that it keeps: arguments and results are copied to memory of this process before they are checked, and the model
goes on with those copies. Checks are put off: those of many rows until the worker computes the next operation, those of
a few rows, as in decoding, until the forward ends, when they are made together. Nothing that was computed from a result
is shown before.

Shape suffixes: N rows, R repetitions, k input width, m output width.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np
import torch

from ..boundary.operations import LINEARS, SCORES
from ..checkpoint import Checkpoint, Progress
from ..checkpoint.matrices import MatrixKey, matrix_name, stacked_matrices
from ..errors import WorkerTampered
from ..model.program import WorkerOp
from .base import NEITHER, VERIFIED, Covered, Shield, belongs_to_another, is_linear
from .put_off import PutOff

LAMBDA = 6.0
_ROUNDOFF = 2.0**-24  # of float32
_TINY = 1e-30  # for a row of zeros, whose difference is exactly 0
_BLOCK_BYTES = 1 << 20


class _Secret(NamedTuple):
    """What is kept of one matrix."""

    s_mR: torch.Tensor
    c_kR: torch.Tensor
    of_bias_R: torch.Tensor
    frobenius: torch.Tensor


class _Done(NamedTuple):
    """A product whose check is put off."""

    op: WorkerOp
    x_Nk: torch.Tensor
    y_Nm: torch.Tensor


class VerifyShield(Shield):
    """Verifies linear operations; see this module for what that promises.

    Args:
        repetitions: how many independent secrets there are for each matrix.
    """

    name = "verify"

    def __init__(self, repetitions: int = 1) -> None:
        super().__init__()
        self._repetitions = repetitions
        self._random = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(32), "little")))
        self._secrets: dict[MatrixKey, _Secret] = {}
        self._put_off = PutOff(self._check_in_blocks, self._check_together)
        self._compute = self._wire = torch.float32
        self._rounding = 0.0

    def load(
        self, checkpoint: Checkpoint, compute: torch.dtype, wire: torch.dtype, progress: Progress | None = None
    ) -> None:
        if self._secrets:
            raise belongs_to_another()
        self._compute, self._wire = compute, wire
        self._rounding = max(_roundoff_of(compute), _roundoff_of(wire))
        matrices = stacked_matrices(checkpoint.outline)
        for done, (matrix, (weights, biases)) in enumerate(matrices.items(), start=1):
            self._secrets[matrix] = self._secret_of(checkpoint, weights, biases)
            if progress is not None:
                progress(done, len(matrices))

    def cover(self, op: WorkerOp) -> Covered:
        self.count(op)
        if not op.operation.is_linear:
            return Covered(op, torch.Tensor.clone)
        return Covered(op, lambda result: self._taken(op, result))

    def treatment(self, operation: str) -> str:
        return VERIFIED if is_linear(operation) else NEITHER

    @property
    def bound(self) -> str:
        power = f" to the power of {self._repetitions}" if self._repetitions > 1 else ""
        return (
            "a row that is wrong by r times the threshold of rounding is accepted with a probability of at most "
            f"1.6/r{power}"
        )

    def settle(self) -> None:
        self._put_off.settle()

    def work(self) -> None:
        self._put_off.work()

    def _secret_of(self, checkpoint: Checkpoint, names: list[str], biases: list[str]) -> _Secret:
        """Draw the secret of a matrix that is stacked of several, in one pass that keeps no rows."""
        width = checkpoint.shape(names[0])[1]
        c_kR, squares, parts = torch.zeros(width, self._repetitions, dtype=torch.float64), 0.0, []
        for name in names:
            for stored in checkpoint.blocks(name):
                block = stored.to(self._compute).to(torch.float32)
                s_mR = torch.from_numpy(self._random.standard_normal((len(block), self._repetitions), np.float32))
                c_kR += block.t() @ s_mR
                squares += float(block.square().sum(dtype=torch.float64))
                parts.append(s_mR)
        s_mR = torch.cat(parts)
        of_bias_R = torch.zeros(self._repetitions, dtype=torch.float64)
        if biases:
            bias = torch.cat([checkpoint.read(name) for name in biases]).to(self._compute).to(torch.float64)
            of_bias_R = bias @ s_mR.to(torch.float64)
        return _Secret(s_mR, c_kR.to(torch.float32), of_bias_R.to(torch.float32), torch.tensor(math.sqrt(squares)))

    def _taken(self, op: WorkerOp, result: torch.Tensor) -> torch.Tensor:
        """A copy of a result that was checked, or will be before anything of it is shown."""
        if op.operation not in LINEARS:
            own = result.clone()
            self._check_pair(op, own)
            return own
        argument = op.arguments[0]
        rows = argument.shape[0] * argument.shape[1]
        x_Nk = argument.reshape(rows, -1)
        own = result.clone(memory_format=torch.contiguous_format)
        self._put_off.add(_Done(op, x_Nk, own.view(rows, -1)), op.operation, rows)
        return own

    def _check_in_blocks(self, done: _Done) -> None:
        """Check many rows of one product, in parts that stay in the processor's cache."""
        secret = self._secrets[done.op.operation, done.op.layer]
        rows, width = done.y_Nm.shape
        step = max(1, _BLOCK_BYTES // (4 * width))
        for start in range(0, rows, step):
            block = slice(start, start + step)
            self._check(done.op, secret, done.x_Nk[block], done.y_Nm[block])

    def _check(self, op: WorkerOp, secret: _Secret, x_Nk: torch.Tensor, y_Nm: torch.Tensor) -> None:
        """Check rows of one product."""
        difference_NR, threshold_N = self._compare(self._as_used(x_Nk), y_Nm, secret)
        self._judge(op, difference_NR, threshold_N)

    def _check_together(self, several: list[_Done]) -> None:
        """Check products of one operation and as many rows each, of several layers."""
        secrets = [self._secrets[done.op.operation, done.op.layer] for done in several]
        x_LNk = self._as_used(torch.stack([done.x_Nk for done in several]))
        y_LNm = torch.stack([done.y_Nm for done in several])
        secret_L = _Secret(
            torch.stack([one.s_mR for one in secrets]),
            torch.stack([one.c_kR for one in secrets]),
            torch.stack([one.of_bias_R for one in secrets])[:, None],
            torch.stack([one.frobenius for one in secrets])[:, None],
        )
        difference_LNR, threshold_LN = self._compare(x_LNk, y_LNm, secret_L)
        if not self._is_within(difference_LNR, threshold_LN):
            for done, difference_NR, threshold_N in zip(several, difference_LNR, threshold_LN, strict=True):
                self._judge(done.op, difference_NR, threshold_N)

    def _check_pair(self, op: WorkerOp, y: torch.Tensor) -> None:
        """Check a product of two tensors that this process has: attention's, in mode op."""
        left, right = (self._as_used(argument) for argument in op.arguments)
        matrix = right.transpose(2, 3) if op.operation is SCORES else right  # B H k m
        s_mR = torch.from_numpy(self._random.standard_normal((matrix.shape[3], self._repetitions), np.float32))
        frobenius = torch.linalg.vector_norm(matrix, dim=(2, 3))[..., None]
        self._judge(op, *self._compare(left, y, _Secret(s_mR, matrix @ s_mR, torch.zeros(()), frobenius)))

    def _compare(self, x: torch.Tensor, y: torch.Tensor, secret: _Secret) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much rows of a product differ from what they should be, [..., N, R], and may differ, [..., N].

        Several products at once have dimensions in front, as has ``secret`` then.
        """
        y = y.to(torch.float32)
        difference = (y @ secret.s_mR).sub_(x @ secret.c_kR).sub_(secret.of_bias_R)
        by_x = LAMBDA * _ROUNDOFF * (2 * math.sqrt(x.shape[-1]) + 1)
        by_y = LAMBDA * (_ROUNDOFF * math.sqrt(y.shape[-1]) + self._rounding)
        x_norms, y_norms = (torch.linalg.vector_norm(one, dim=-1) for one in (x, y))
        return difference, secret.frobenius * x_norms * by_x + y_norms * by_y + _TINY

    def _as_used(self, argument: torch.Tensor) -> torch.Tensor:
        """An argument as the worker uses it, after it has crossed."""
        return argument.to(self._wire).to(self._compute).to(torch.float32)

    @staticmethod
    def _is_within(difference: torch.Tensor, threshold: torch.Tensor) -> bool:
        """Whether all rows are right; a difference that is no number is not, and one that is infinite."""
        return bool((difference.abs_() < threshold[..., None]).all())

    def _judge(self, op: WorkerOp, difference: torch.Tensor, threshold: torch.Tensor) -> None:
        if self._is_within(difference, threshold):
            return
        off = float((difference.abs() / threshold[..., None]).nan_to_num(math.inf).max())
        where = matrix_name((op.operation, op.layer))
        raise WorkerTampered(
            f"the worker returned a wrong result of {where}: it is off by {off:.3g} times what rounding explains. "
            "It is hostile, computes wrongly, or holds other weights"
        )


def _roundoff_of(dtype: torch.dtype) -> float:
    """The unit roundoff of a dtype that results are rounded to; 0 for float32, whose rounding counts elsewhere."""
    return 0.0 if dtype == torch.float32 else float(torch.finfo(dtype).eps) / 2
