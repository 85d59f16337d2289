"""Tells which shapes, tensors and arrays are plain data, whose bytes are their values; all others are refused by name.

A tensor of another type (fake, masked, batched by vmap, sparse, quantised …) has no such bytes, or bytes that mean
something else. Only the caller knows how to turn it into plain data.
"""

from __future__ import annotations

from operator import index
from typing import Any, NoReturn

import numpy as np
import torch

from ..core.tensors import MAX_DIMENSIONS
from ..errors import LocalProtocolError
from ..text import printable
from .descriptor import representable
from .dtypes import BY_NAME, BY_TORCH, AnyDType, DType

_STRIDED = torch.strided
_BY_NUMPY: dict[np.dtype[Any], DType] = {
    dtype: row
    for row in BY_NAME.values()
    if row.numpy is not None
    for dtype in (row.numpy, row.numpy.newbyteorder("S"))
}
_OF_A_LIBRARY = 2  # dtype.isbuiltin: registered by another library, such as ml_dtypes


def refuse_shape(error: TypeError) -> NoReturn:
    """Raise the error for a shape that contains something other than integers."""
    raise LocalProtocolError(f"a shape is a sequence of integers, such as (3, 4): {printable(str(error))}") from error


def sizes_of(shape: Any) -> tuple[int, ...]:
    """Return the sizes of a shape; an integer is the shape of one dimension.

    Raises:
        LocalProtocolError: it is neither an integer nor a sequence of them.
    """
    try:
        return tuple(map(index, shape))
    except TypeError as error:
        try:
            return (index(shape),)
        except TypeError:
            refuse_shape(error)


def _name_of(dtype: Any) -> str:
    """Return the name of a dtype that was given by name or as one of numpy's."""
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    if isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic)):
        return str(np.dtype(dtype).name)
    return ""


def row_of(dtype: AnyDType) -> DType:
    """The table's row of a dtype.

    Raises:
        LocalProtocolError: it is not in the table, or not a dtype of torch or numpy, or the name of one.
    """
    try:
        return BY_TORCH[dtype]  # type: ignore[index]  # most are torch's
    except (KeyError, TypeError):
        named = BY_NAME.get(_name_of(dtype))
        if named is not None:
            return named
        raise LocalProtocolError(
            f"tensors of {printable(str(dtype)[:64])} can't be sent; known dtypes: {', '.join(map(str, BY_TORCH))}"
        ) from None


def is_on_device(value: Any) -> bool:
    """Whether a value is a tensor on a GPU, of a library other than torch."""
    return not isinstance(value, torch.Tensor) and hasattr(type(value), "__cuda_array_interface__")


def without_bytes(sizes: tuple[int, ...], row: DType) -> torch.Tensor:
    """Make an empty tensor of this shape.

    Raises:
        LocalProtocolError: no tensor, or no empty one, can have this shape.
    """
    if len(sizes) > MAX_DIMENSIONS:
        raise LocalProtocolError(f"a tensor of {len(sizes)} dimensions can't be sent; the limit is {MAX_DIMENSIONS}")
    if any(size >> 63 for size in sizes):  # negative, or so large that it might not even have a text
        raise LocalProtocolError("no tensor can have this shape: a size is negative, or beyond 64 bits")
    if not representable(sizes, row.itemsize):
        raise LocalProtocolError(f"no tensor can have the shape {sizes}: its bytes can't be counted in 64 bits")
    return torch.empty(sizes, dtype=row.torch)


def address_of(tensor: torch.Tensor) -> int:
    """The address at which a tensor's storage begins.

    Raises:
        LocalProtocolError: it is not a plain, dense tensor.
    """
    kind = type(tensor)
    if kind is not torch.Tensor and not _is_plain(kind):
        raise LocalProtocolError(
            f"a {kind.__name__} can't be sent: it may mean more than its bytes; send plain tensors, such as those that "
            "it is made of"
        )
    if tensor.layout is not _STRIDED or tensor.is_nested:
        raise LocalProtocolError("only dense tensors can be sent")
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError as error:
        raise LocalProtocolError(
            "a tensor without memory of its own can't be sent, such as one inside of vmap, grad or functionalize"
        ) from error


def _is_plain(kind: type[torch.Tensor]) -> bool:
    """Whether a subclass, like nn.Parameter, changes nothing that torch does with a tensor."""
    by_function = _underlying(kind.__torch_function__)
    return kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and any(
        by_function is _underlying(plain.__torch_function__) for plain in (torch.Tensor, torch.nn.Parameter)
    )


def _underlying(method: Any) -> Any:
    """The function behind a class method; anything else as it is."""
    return getattr(method, "__func__", method)


def check_content(tensor: torch.Tensor, row: DType) -> None:
    """Check that a tensor has content to copy.

    Raises:
        LocalProtocolError: it is a meta tensor, or its storage was freed, as by ``resize_(0)``.
    """
    there = tensor.untyped_storage().nbytes()
    if (
        tensor.is_contiguous()
        and tensor.storage_offset() * row.itemsize + tensor.nbytes <= there
        and not tensor.is_meta
    ):
        return
    if tensor.is_meta:
        raise LocalProtocolError("a meta tensor has no content and can't be sent")
    if tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * row.itemsize
        if needed > there:
            raise LocalProtocolError(
                f"a tensor whose storage has {there} of the {needed} bytes that it needs can't be sent: was it freed?"
            )


def row_of_array(array: np.ndarray[Any, Any]) -> DType:
    """The table's row of an array's dtype; a dtype of ml_dtypes is found by its name.

    Raises:
        LocalProtocolError: there is none, or the array means more than its bytes.
    """
    kind, dtype = type(array), array.dtype
    row = _BY_NUMPY.get(dtype)
    if row is None and dtype.isbuiltin == _OF_A_LIBRARY:
        named = BY_NAME.get(dtype.name)
        row = named if named is not None and named.itemsize == dtype.itemsize else None
    if row is None or (kind is not np.ndarray and not _is_plain_array(kind)):
        raise _array_error(array)
    return row


def _is_plain_array(kind: type[np.ndarray[Any, Any]]) -> bool:
    """Whether a subclass changes nothing that numpy does with an array: a mask or a unit would be lost."""
    if issubclass(kind, np.ma.MaskedArray):
        return False
    names = ("__array_ufunc__", "__array_function__")
    return all(getattr(kind, name) is getattr(np.ndarray, name) for name in names)


def of_a_library(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array's dtype is another library's, so that numpy may not know it at the other end."""
    return bool(array.dtype.isbuiltin == _OF_A_LIBRARY)


def _array_error(array: np.ndarray[Any, Any]) -> LocalProtocolError:
    return LocalProtocolError(
        f"a {type(array).__name__} of {printable(str(array.dtype)[:64])} can't be sent; known dtypes: "
        f"{', '.join(BY_NAME)}"
    )


def refuse_copy(error: Exception) -> NoReturn:
    """Raise the error for a copy that failed; another library's code may have raised anything."""
    raise LocalProtocolError(f"a value's content can't be copied: {printable(str(error)[:200])}") from error
