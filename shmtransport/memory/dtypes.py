"""Lists the dtypes that can be sent: wire name, torch dtype, numpy dtype, bytes per element.

Bytes are reinterpreted, never converted, so that any fixed-width type crosses unchanged.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch


class DType(NamedTuple):
    """One row of the table.

    ``numpy`` is None where numpy has no such type: such tensors arrive as torch tensors only. ``carrier`` is the numpy
    type that their bytes are handled as: numpy's own, or else its integer of the same size.
    """

    name: str
    torch: torch.dtype
    numpy: np.dtype[Any] | None
    itemsize: int
    carrier: np.dtype[Any]


_TORCH_ONLY = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "complex32",
)
_IN_BOTH = (
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


def _row(name: str, in_numpy: bool) -> DType:
    dtype: torch.dtype = getattr(torch, name)
    known = np.dtype(name) if in_numpy else None
    return DType(name, dtype, known, dtype.itemsize, known or np.dtype(f"i{dtype.itemsize}"))


TABLE: tuple[DType, ...] = (
    *(_row(name, True) for name in _IN_BOTH),
    *(_row(name, False) for name in _TORCH_ONLY),
)
# torch warns when the first tensor of complex32 is made; that would be in the middle of some call.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.empty(0, dtype=torch.complex32)

INTEGERS: dict[int, torch.dtype] = {size: getattr(torch, f"int{8 * size}") for size in (1, 2, 4)}
"""torch's integers by their size in bytes, to view tensors of dtypes that numpy doesn't have."""
BY_NAME: dict[str, DType] = {row.name: row for row in TABLE}
BY_TORCH: dict[torch.dtype, DType] = {row.torch: row for row in TABLE}

AnyDType: TypeAlias = "torch.dtype | np.dtype[Any] | type[np.generic] | str"
"""A dtype as a user may give it: torch's, numpy's, or the name of one."""
