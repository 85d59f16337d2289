"""Freivalds' test of exact products, in prime fields.

For a matrix Q of whole numbers with m rows and k columns, a secret vector s, uniform modulo a prime p, is drawn and c =
sᵀQ kept. A result y for an argument z is right only if s·y = c·z modulo p. If y differs from Q·z in a number that is
not a multiple of p, a fraction of 1/p of all s do not show it. Modulo a power of two it could be a half, so a field it
is.

Results are whole numbers of 32 bits, and so is what they should be: they differ by less than 2³². The test is made with
three primes just below 2²⁰. A difference below 2³² that is not zero is a multiple of at most one of them, since the
product of two is near 2⁴⁰. So at least two independent tests apply, and a wrong row passes with a probability of at
most p⁻², below 2⁻³⁹.

All sums are whole numbers below 2⁵³ and so exact in float64: secrets and c are below 2²⁰; y is taken as two halves of
16 bits, as z has at most, which leaves 2¹⁷ terms at a time.

Shape suffixes: N rows, k input width, m output width, P primes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

PRIMES = (1048573, 1048571, 1048559)
"""The three largest below 2²⁰."""

BOUND = "2⁻³⁹"
"""The probability with which a wrong row passes is below that."""

_MOST_TERMS = 1 << 17
_HALF_BITS = 16
_MODULI_P = torch.tensor(PRIMES, dtype=torch.int64)


class FieldSecret(NamedTuple):
    """What is kept of one matrix, in float64."""

    s_mP: torch.Tensor
    c_kP: torch.Tensor


class FieldTest:
    """Draws secrets and tests products with them."""

    @staticmethod
    def secret_of(blocks_mk: Iterable[torch.Tensor]) -> FieldSecret:
        """Draw the secret of a matrix that comes in blocks of rows, int8."""
        parts, total_kP = [], None
        for block_mk in blocks_mk:
            s_mP = _draw(len(block_mk))
            part_kP = _modulo(block_mk.to(torch.float64).t() @ s_mP)
            total_kP = part_kP if total_kP is None else total_kP + part_kP
            parts.append(s_mP)
        if total_kP is None:
            raise ValueError("a matrix without rows has no secret")
        return FieldSecret(torch.cat(parts), (total_kP % _MODULI_P).to(torch.float64))

    @staticmethod
    def is_right(secret: FieldSecret, argument_Nk: torch.Tensor, product_Nm: torch.Tensor) -> bool:
        """Whether every row of a product, int32, is that of the argument, int32 of at most 16 bits.

        Several products at once have a dimension in front, as has ``secret`` then.
        """
        high_Nm, low_Nm = product_Nm >> _HALF_BITS, product_Nm & ((1 << _HALF_BITS) - 1)
        found_NP = (_times(high_Nm, secret.s_mP) << _HALF_BITS) + _times(low_Nm, secret.s_mP)
        return torch.equal(found_NP % _MODULI_P, _times(argument_Nk, secret.c_kP) % _MODULI_P)


def _draw(rows: int) -> torch.Tensor:
    """Numbers from the system's generator, [rows, P], uniform modulo the primes but for a bias below 2⁻⁴⁰."""
    drawn = np.frombuffer(os.urandom(8 * rows * len(PRIMES)), np.uint64).reshape(rows, len(PRIMES))
    return torch.from_numpy((drawn % np.array(PRIMES, np.uint64)).astype(np.float64))


def _times(numbers_Nm: torch.Tensor, secret_mP: torch.Tensor) -> torch.Tensor:
    """The product of numbers of 16 bits with secrets modulo the primes, in parts whose sums are exact."""
    total_NP = torch.zeros((*numbers_Nm.shape[:-1], len(PRIMES)), dtype=torch.int64)
    for start in range(0, secret_mP.shape[-2], _MOST_TERMS):
        terms = slice(start, start + _MOST_TERMS)
        total_NP += _modulo(numbers_Nm[..., terms].to(torch.float64) @ secret_mP[..., terms, :])
    return total_NP


def _modulo(exact_NP: torch.Tensor) -> torch.Tensor:
    """Whole numbers in float64 modulo the primes, from 0 on."""
    return exact_NP.to(torch.int64) % _MODULI_P
