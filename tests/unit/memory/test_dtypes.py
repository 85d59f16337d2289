"""The table of dtypes: one row a type, names and sizes that torch and numpy agree on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shmtransport.memory.dtypes import BY_NAME, BY_TORCH, TABLE, DType

EXPECTED = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64", "bfloat16"),
    *("complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
}
_ids = {"ids": lambda row: row.name}


def test_every_fixed_width_dtype_is_in_the_table() -> None:
    """Booleans, all integers, floats with bfloat16 and the float8 kinds, and complex numbers can be sent."""
    assert {row.name for row in TABLE} >= EXPECTED


def test_names_and_types_are_unique() -> None:
    """A wire name means one dtype and a dtype has one wire name."""
    assert len(BY_NAME) == len(BY_TORCH) == len(TABLE)
    assert all(BY_NAME[row.name] is row and BY_TORCH[row.torch] is row for row in TABLE)


@pytest.mark.parametrize("row", TABLE, **_ids)
def test_a_row_agrees_with_torch(row: DType) -> None:
    """The wire name is torch's own name, and the item size is torch's."""
    assert str(row.torch) == f"torch.{row.name}"
    assert row.itemsize == torch.frombuffer(bytearray(16), dtype=row.torch).element_size()
    assert 64 % row.itemsize == 0, "a block's alignment holds for every dtype"


@pytest.mark.parametrize("row", TABLE, **_ids)
def test_the_numpy_dtype_is_the_one_that_torch_converts_to(row: DType) -> None:
    """``numpy`` is what ``Tensor.numpy()`` gives, and None exactly where that is impossible."""
    tensor = torch.frombuffer(bytearray(16), dtype=row.torch)
    if row.numpy is None:
        with pytest.raises(TypeError):
            tensor.numpy()
    else:
        assert tensor.numpy().dtype == row.numpy == np.dtype(row.name)
        assert row.numpy.itemsize == row.itemsize
