"""Freivalds' test in prime fields: a right product always passes, a wrong one practically never."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_split.model.integers import multiply_exactly
from llama_split.shields import prime_field
from llama_split.shields.prime_field import PRIMES, FieldSecret, FieldTest

LIMIT = 1 << 31


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def test_the_moduli_are_the_largest_primes_below_2_to_the_20() -> None:
    """And any two of them together exceed every difference of two 32-bit numbers."""
    below = (number for number in range((1 << 20) - 1, 0, -1) if is_prime(number))
    assert tuple(next(below) for _ in PRIMES) == PRIMES
    assert min(PRIMES) ** 2 > 1 << 32


def example(rows: int, outputs: int, width: int, seed: int) -> tuple[FieldSecret, torch.Tensor, torch.Tensor]:
    """A secret, an argument, and the right product."""
    generator = np.random.default_rng(seed)
    weights = torch.from_numpy(generator.integers(-127, 128, (outputs, width), dtype=np.int8))
    argument = torch.from_numpy(generator.integers(-32767, 32768, (rows, width), dtype=np.int32))
    secret = FieldTest().secret_of(weights.split(max(outputs // 3, 1)))  # type: ignore[no-untyped-call]
    return secret, argument, multiply_exactly(argument, weights)


@given(st.integers(1, 5), st.integers(1, 50), st.integers(1, 400), st.integers(0, 999))
def test_a_right_product_passes(rows: int, outputs: int, width: int, seed: int) -> None:
    """Of any shape: nothing is rounded."""
    secret, argument, product = example(rows, outputs, width, seed)
    assert FieldTest.is_right(secret, argument, product)


def test_a_right_product_of_the_largest_numbers_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extreme results and secrets, more outputs than are added up at a time, several products at once."""
    monkeypatch.setattr(prime_field, "_MOST_TERMS", 64)
    outputs = 150
    product = torch.full((7, outputs), -LIMIT, dtype=torch.int32)
    product[::2] = LIMIT - 1
    s_mP = torch.tensor(PRIMES, dtype=torch.float64).sub_(1).expand(outputs, 3).contiguous()
    exact = product.to(torch.int64).numpy().astype(object) @ s_mP.to(torch.int64).numpy().astype(object)
    # An argument of one column, with the c that makes the product right for each row in turn.
    for row in range(len(product)):
        c_kP = torch.tensor([[int(value) % prime for value, prime in zip(exact[row], PRIMES, strict=True)]])
        secret = FieldSecret(s_mP, c_kP.to(torch.float64))
        one = torch.ones((len(product), 1), dtype=torch.int32)
        same = product[row].expand_as(product)
        assert FieldTest.is_right(secret, one, same)
        twice = FieldSecret(*(torch.stack((part, part)) for part in secret))
        assert FieldTest.is_right(twice, torch.stack((one, one)), torch.stack((same, same)))
        assert not FieldTest.is_right(twice, torch.stack((one, one)), torch.stack((same, same ^ 1)))


@pytest.mark.parametrize("by", [1, -1, 1 << 16, 1 << 31, *PRIMES, 4095 * PRIMES[0], -2048 * PRIMES[2]])
def test_any_change_of_one_number_is_found(by: int) -> None:
    """Multiples of each prime too, which that prime alone would never show, and of each power of two."""
    for seed in range(50):
        secret, argument, product = example(3, 20, 40, seed)
        changed = product.to(torch.int64)
        changed[seed % 3, seed % 20] += by
        wrapped = ((changed + LIMIT) % (2 * LIMIT) - LIMIT).to(torch.int32)
        assert not FieldTest.is_right(secret, argument, wrapped)


def test_how_often_a_wrong_row_passes_is_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With primes so small that it happens: a difference that one of them does not show passes with 1/(p·q) at most."""
    small = (3, 5, 7)
    monkeypatch.setattr(prime_field, "PRIMES", small)
    monkeypatch.setattr(prime_field, "_MODULI_P", torch.tensor(small))
    generator = np.random.default_rng(1)
    weights = torch.from_numpy(generator.integers(-127, 128, (6, 9), dtype=np.int8))
    argument = torch.from_numpy(generator.integers(-99, 100, (1, 9), dtype=np.int32))
    wrong = multiply_exactly(argument, weights)
    wrong[0, 2] += 7
    test, tries = FieldTest(), 3000
    passed = sum(FieldTest.is_right(test.secret_of([weights]), argument, wrong) for _ in range(tries))
    expected = 1 / 15
    assert abs(passed / tries - expected) < 5 * math.sqrt(expected / tries)


def test_a_matrix_without_rows_is_refused() -> None:
    """It has no products."""
    with pytest.raises(ValueError, match="without rows"):
        FieldTest().secret_of([])
