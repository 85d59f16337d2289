"""How torch's tensors are made over the bytes of a segment, and which twin of the core does so."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

from .. import core
from ..core import python_twin
from ..core.tensors import Arrays, Tensors
from .descriptor import TensorDescriptor
from .dtypes import BY_NAME, BY_TORCH, TABLE, DType

Memory: TypeAlias = "np.ndarray[Any, Any]"
"""What a tensor's storage keeps alive, as do numpy views of the tensor."""

_new_array, _from_numpy = np.ndarray, torch.from_numpy


def view(data: memoryview, offset: int, row: DType, shape: tuple[int, ...]) -> tuple[Memory, torch.Tensor]:
    """Make a tensor over the bytes of ``data`` from ``offset`` on; it comes with what its storage keeps alive.

    Built through numpy: one array with its final shape, where ``torch.frombuffer`` would need a second tensor.
    """
    array: Memory = _new_array(shape, row.carrier, data, offset)
    tensor = _from_numpy(array)
    return array, tensor if row.numpy is not None else tensor.view(row.torch)


def tensor_over(array: Memory) -> torch.Tensor | None:
    """Make a tensor over a contiguous array's memory; None for an array whose memory torch can't take as it is."""
    if not (array.flags.c_contiguous and array.flags.writeable):  # torch warns about those that are read-only
        return None
    try:
        return _from_numpy(array)
    except (TypeError, ValueError):  # a dtype, a byte order or strides that torch doesn't have
        return None


def array_over(tensor: torch.Tensor) -> Memory:
    """Make the array over a received tensor's memory; read-only, since it is the peer's.

    Raises:
        TypeError: numpy has no such dtype.
    """
    array: Memory = tensor.numpy()
    array.flags.writeable = False
    return array


def native_knows(tensors: Tensors) -> bool:
    """Whether the compiled twin can make these tensors."""
    from ..core import native_twin  # only here: it may not be there

    return native_twin.knows(tensors)


def _dlpack_code(row: DType) -> int:
    """The code of a dtype in DLPack, https://dmlc.github.io/dlpack/latest/c_api.html#_CPPv413DLDataTypeCode."""
    for start, code in _DLPACK_CODES.items():
        if row.name.startswith(start):
            return code
    raise AssertionError(row.name)


_DLPACK_CODES = {
    "int": 0,
    "uint": 1,
    "float8_e4m3fnuz": 11,
    "float8_e4m3fn": 10,
    "float8_e5m2fnuz": 13,
    "float8_e5m2": 12,
    "float8_e8m0fnu": 14,
    "float": 2,
    "bfloat": 4,
    "complex": 5,
    "bool": 6,
}
TENSORS = Tensors(
    type=torch.Tensor,
    rows=tuple(
        (row.torch, row.name, _dlpack_code(row), 8 * row.itemsize, row.itemsize, row.numpy is not None) for row in TABLE
    ),
    by_dtype=BY_TORCH,
    by_name=BY_NAME,
    view=view,
    describe=TensorDescriptor,
    arrays=Arrays(np.ndarray, torch.from_numpy, torch.Tensor.numpy),
)
HAS_EXCHANGE = core.CORE == "native" and native_knows(TENSORS)
"""Whether the compiled twin makes the tensors, for which torch must be 2.10 or later."""
_twin = core if HAS_EXCHANGE else python_twin
Loans, Borrows = _twin.Loans, _twin.Borrows
