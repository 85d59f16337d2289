"""How a library's tensors are made over memory: the core knows no library, and is told by ``memory/views``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MAX_DIMENSIONS = 16


class Arrays(NamedTuple):
    """Another library's arrays, which cross as tensors; for the compiled twin."""

    type: type
    tensor_of: Callable[[Any], Any]
    """Makes a tensor over an array's memory; a TypeError or ValueError for an array that is sent in another way."""
    array_of: Callable[[Any], Any]
    """Makes the array over a tensor's memory. Both are built in: no signal handler runs in the middle of them."""


class Tensors(NamedTuple):
    """One library's tensors.

    ``rows`` are for the compiled twin, which asks the exchange table of ``type`` for everything else. Each has a dtype,
    its name, its code and bits in DLPack, its size in bytes, and whether there are arrays of it.
    """

    type: type
    rows: tuple[tuple[Any, str, int, int, int, bool], ...]
    by_dtype: Mapping[Any, Any]
    """A row of the library's dtypes; ``itemsize`` is all that the core knows of it."""
    by_name: Mapping[str, Any]
    view: Callable[[memoryview, int, Any, tuple[int, ...]], tuple[Any, Any]]
    """Makes a tensor at an offset, and gives the memory that lives as long as its storage."""
    describe: Callable[..., Any]
    """Makes a descriptor of (offset, shape, dtype, slot, sequence)."""
    arrays: Arrays | None = None


def address_of_memory(memory: memoryview) -> int:
    """The address at which a writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def extent_of(shape: Any, itemsize: int) -> int:
    """The size in bytes of a tensor of this shape; 0 if it has no elements, or this is no tuple of sizes."""
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        return 0
    nbytes = itemsize
    for size in shape:
        if type(size) is not int or size <= 0:
            return 0
        nbytes *= size
    return nbytes if nbytes < 2**63 else 0
