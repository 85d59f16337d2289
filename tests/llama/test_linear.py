"""A worker's product with a weight matrix is the same whichever way it is computed."""

from __future__ import annotations

import pytest
import torch

from llama_split.worker import weights
from llama_split.worker.weights import Linear


@pytest.mark.parametrize("by_one_dnn", [False, True])
@pytest.mark.parametrize("is_faster_by_vector", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_exact_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    wire: torch.dtype,
    rows: int,
    has_bias: bool,
    is_faster_by_vector: bool,
    by_one_dnn: bool,
) -> None:
    """Any number of rows, with or without bias, and a result of another dtype; within the rounding of these dtypes.

    A sum of n products in any order is off by n times half the precision of the sum of their sizes at most (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    monkeypatch.setattr(weights, "_IS_FASTER_BY_VECTOR", is_faster_by_vector)
    monkeypatch.setattr(weights, "_one_dnn", weights._find_one_dnn() if by_one_dnn else None)
    width = 96
    weight, argument = torch.randn(48, width).to(dtype), torch.randn(1, rows, width).to(dtype)
    bias = torch.randn(48).to(dtype) if has_bias else None
    result = torch.full((1, rows, 48), torch.nan, dtype=wire)
    assert Linear(weight, bias)(argument, result) is result
    exact = argument.double() @ weight.double().t() + (0 if bias is None else bias.double())
    sizes = argument.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    summed = (width + 1) * torch.finfo(torch.float32).eps / 2
    rounded = torch.finfo(dtype).eps + torch.finfo(wire).eps
    assert ((result.double() - exact).abs() <= summed * sizes + rounded * exact.abs()).all()


def test_a_bias_with_gaps_is_added_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """To oneDNN it would look as if it had none."""
    monkeypatch.setattr(weights, "_one_dnn", weights._find_one_dnn())
    weight, argument, bias = torch.randn(48, 96), torch.randn(3, 96), torch.arange(96.0)[::2]
    result = Linear(weight, bias)(argument, torch.empty(3, 48))
    torch.testing.assert_close(result, argument @ weight.t() + bias, rtol=1e-5, atol=1e-4)


def test_one_dnn_sees_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps memory for each of them, so that prompts of all lengths would fill a worker."""
    seen = set()

    def product(rows: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
        seen.add(len(rows))
        return rows @ weight.t()

    monkeypatch.setattr(weights, "_one_dnn", product)
    weight = torch.randn(48, 96)
    for rows in range(40):
        argument = torch.randn(rows, 96)
        torch.testing.assert_close(Linear(weight, None)(argument, torch.empty(rows, 48)), argument @ weight.t())
    assert seen == {1, 2, 4, 8, 16}
