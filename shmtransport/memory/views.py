"""Makes tensors over the bytes of a segment, and the memory object that lives as long as the last of them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from .dtypes import DType

Memory: TypeAlias = "np.ndarray[Any, Any]"
"""What a tensor's storage keeps alive, as do numpy views of the tensor."""

if TYPE_CHECKING:
    Reference = weakref.ref["Memory"]
else:
    Reference = weakref.ref

_new_array, _from_numpy = np.ndarray, torch.from_numpy


def view(data: memoryview, offset: int, row: DType, shape: tuple[int, ...]) -> tuple[Memory, torch.Tensor]:
    """Make a tensor over the bytes of ``data`` from ``offset`` on; it comes with what its storage keeps alive.

    Built through numpy: one array with its final shape, where ``torch.frombuffer`` would need a second tensor.
    """
    array: Memory = _new_array(shape, row.carrier, data, offset)
    tensor = _from_numpy(array)
    return array, tensor if row.numpy is not None else tensor.view(row.torch)
