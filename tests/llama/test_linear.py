"""A worker's product with a weight matrix is the same whichever way it is computed."""

from __future__ import annotations

import pytest
import torch

from llama_split.worker.weights import Linear


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_exact_arithmetic(
    dtype: torch.dtype, wire: torch.dtype, rows: int, has_bias: bool
) -> None:
    """One row or more, with or without bias, and a result of another dtype; within the rounding of that dtype."""
    weight, argument = torch.randn(48, 96).to(dtype), torch.randn(1, rows, 96).to(dtype)
    bias = torch.randn(48).to(dtype) if has_bias else None
    result = torch.full((1, rows, 48), torch.nan, dtype=wire)
    assert Linear(weight, bias)(argument, result) is result
    exact = argument.double() @ weight.double().t() + (0 if bias is None else bias.double())
    least_precise = max(torch.finfo(dtype).eps, torch.finfo(wire).eps)
    torch.testing.assert_close(result.double(), exact, rtol=2 * least_precise, atol=32 * least_precise)
