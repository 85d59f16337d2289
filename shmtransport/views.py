"""Tensors over the bytes of a segment, and a weak reference whose death tells that the last of them is gone."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from .dtypes import DType

Memory: TypeAlias = "np.ndarray[Any, Any]"
"""What a tensor's storage owns; numpy views of the tensor own it as well."""

if TYPE_CHECKING:
    Reference = weakref.ref["Memory"]
else:
    Reference = weakref.ref

_new_array, _from_numpy = np.ndarray, torch.from_numpy


def view(data: memoryview, offset: int, row: DType, shape: tuple[int, ...]) -> tuple[Memory, torch.Tensor]:
    """A tensor over the bytes of ``data`` from ``offset`` on, and what its storage owns for as long as it lives.

    By way of numpy: an array is given its shape when it is made, which torch's own function needs a second tensor for.
    """
    array: Memory = _new_array(shape, row.carrier, data, offset)
    tensor = _from_numpy(array)
    return array, tensor if row.numpy is not None else tensor.view(row.torch)
