"""Arithmetic with whole numbers: exact for every argument of 32 bits, and the same in whatever parts it is computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_split.model import integers
from llama_split.model.integers import (
    MOST_LEVELS,
    dequantise,
    greatest_norm,
    levels_for,
    multiply_exactly,
    quantise_rows,
    quantise_tokens,
)

LIMIT = 1 << 31
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(params=["digits", "float64"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to multiply in turn, with limits on the columns that a test reaches."""
    product = {"digits": integers._by_digits, "float64": integers._in_float64}[request.param]
    monkeypatch.setattr(integers, "_way", lambda _device: (product, 100))


def any_int32(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    """Numbers of all 32 bits, the extreme ones among them."""
    numbers = generator.integers(-LIMIT, LIMIT, shape, dtype=np.int32)
    numbers.flat[:: max(numbers.size // 7, 1)] = generator.choice([-LIMIT, LIMIT - 1, -1, 0, 127, 128, -128, 32768])
    return torch.from_numpy(numbers)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("rows", "outputs", "width"), [(1, 1, 1), (2, 3, 1), (1, 33, 64), (3, 17, 250), (70, 40, 101), (200, 5, 7)]
)
def test_products_are_exact_modulo_2_to_the_32(rows: int, outputs: int, width: int) -> None:
    """As computed by numpy in 64 bits, for any argument, few rows and many, more columns than go at a time."""
    generator = np.random.default_rng(rows * outputs + width)
    argument = any_int32(generator, rows, width)
    weights = generator.integers(-127, 128, (outputs, width), dtype=np.int8)
    expected = (argument.numpy().astype(np.int64) @ weights.T.astype(np.int64)).astype(np.int32)
    assert np.array_equal(multiply_exactly(argument, torch.from_numpy(weights)).numpy(), expected)


@pytest.mark.parametrize("value", [-LIMIT, LIMIT - 1, 0x7F7F7F7F, -0x7F7F7F80, 0x00808080])
def test_the_largest_sums_do_not_overflow(value: int) -> None:
    """The widest matrices of Llamas, all numbers extreme, by whatever way this machine uses."""
    width = 40_000
    argument = torch.full((2, width), value, dtype=torch.int32)
    for weight in (-127, 127):
        expected = np.int64(value) * weight * width
        product = multiply_exactly(argument, torch.full((3, width), weight, dtype=torch.int8))
        assert (product == int(expected.astype(np.int32))).all()


def test_a_processor_that_saturates_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products of 8 bits are not used."""
    honest = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: honest(left, right).clamp_(max=32767))
    product, _ = integers._way.__wrapped__("cpu")
    assert product is integers._in_float64


@given(st.data())
def test_a_row_is_quantised_alike_in_every_block(data: st.DataObject) -> None:
    """So that both sides, which read in blocks of their own, have the same numbers."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    weight = torch.randn((9, 21), generator=generator) * 10.0 ** data.draw(st.integers(-42, 30))
    first, last = sorted(data.draw(st.tuples(st.integers(0, 8), st.integers(1, 9))))
    whole, scales = quantise_rows(weight)
    if first < last:
        part, part_scales = quantise_rows(weight[first:last])
        assert torch.equal(part, whole[first:last])
        assert torch.equal(part_scales, scales[first:last])
    wrong = (whole.to(torch.float32) * scales[:, None] - weight).abs()
    assert (wrong <= scales[:, None] * 0.5001).all()


def test_rows_of_zeros_stay_zeros() -> None:
    """Weights of zeros, and tokens."""
    quantised, scales = quantise_rows(torch.zeros(2, 5))
    tokens, of_tokens = quantise_tokens(torch.zeros(3, 5), 1000)
    assert not quantised.any()
    assert not tokens.any()
    assert torch.isfinite(torch.cat((scales, of_tokens))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    """They have no scale."""
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        quantise_rows(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_has_no_finite_product(value: float) -> None:
    """It spoils its own row, as it would in floating point, and no other."""
    argument = torch.randn(3, 8)
    argument[1, 5] = value
    tokens, scales = quantise_tokens(argument, 900)
    weight, of_rows = quantise_rows(torch.randn(6, 8))
    result = dequantise(multiply_exactly(tokens, weight), scales, of_rows, torch.ones(6))
    assert torch.isfinite(result).all(dim=1).tolist() == [True, False, True]
    assert not torch.isfinite(result[1]).any()


@given(st.integers(1, 60), st.integers(0, 10_000))
def test_the_largest_product_stays_inside_32_bits(width: int, seed: int) -> None:
    """A token whose signs are those of the row with the greatest norm: the product is known from its 32 bits."""
    generator = torch.Generator().manual_seed(seed)
    weight, _ = quantise_rows(torch.randn((4, width), generator=generator) * 3)
    wide = weight.repeat(1, 1000)  # 60 000 columns of 127: ±2³¹ is near
    levels = levels_for(greatest_norm(wide))
    assert 1 <= levels <= MOST_LEVELS
    row = wide[int(wide.to(torch.int64).abs().sum(1).argmax())].to(torch.int64)
    tokens, _ = quantise_tokens(torch.where(row < 0, -1.0, 1.0)[None], levels)
    exact = int((tokens.to(torch.int64) * row).sum())
    assert exact == levels * greatest_norm(wide) < LIMIT
    assert int(multiply_exactly(tokens, row.to(torch.int8)[None])) == exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_near_the_one_in_floating_point(dtype: torch.dtype) -> None:
    """Within what rounding to 8 bits of weights explains: a hundredth of its size."""
    generator = torch.Generator().manual_seed(3)
    weight, argument = (torch.randn(shape, generator=generator) for shape in ((64, 256), (20, 256)))
    quantised, of_rows = quantise_rows(weight)
    tokens, scales = quantise_tokens(argument.to(dtype), levels_for(greatest_norm(quantised)))
    result = dequantise(multiply_exactly(tokens, quantised), scales, of_rows, None)
    expected = argument.to(dtype).to(torch.float32) @ weight.t()
    assert (result - expected).norm() < 0.01 * expected.norm()
