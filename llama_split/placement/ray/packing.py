"""Tensors as Ray carries them: bytes that it need not pickle one by one, and a shape and dtype beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch


class Packed(NamedTuple):
    """One tensor."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    shape: tuple[int, ...]
    dtype: str


class Allocate(Protocol):
    """Makes an uninitialised tensor."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype, /) -> torch.Tensor: ...


def pack(value: Any) -> Any:
    """The value with every tensor in it packed, without a copy where its memory is contiguous."""
    return _mapped(value, _packed)


def unpack(value: Any, allocate: Allocate) -> Any:
    """The value with every packed tensor in it copied into memory that ``allocate`` returns."""

    def unpacked(leaf: Any) -> Any:
        if not isinstance(leaf, Packed):
            return leaf
        tensor = allocate(leaf.shape, getattr(torch, leaf.dtype))
        _bytes_of(tensor)[...] = leaf.data
        return tensor

    return _mapped(value, unpacked)


def _packed(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return Packed(_bytes_of(leaf.contiguous()), tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.view(-1).view(torch.uint8).numpy()


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, Packed):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(one, change) for one in value])
    return change(value)
