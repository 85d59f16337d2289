"""What the tensors of a replayed forward contain, and how both sides check it.

Every tensor counts up in 64-bit words from a number that depends on its operation and its place, so that swapped and
damaged tensors are noticed. An operation is an index into ``OPERATIONS``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .workload import DTYPES, OPERATIONS

RESULT = 1 << 16  # a result's place; those of arguments are small


def as_words(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a tensor as 64-bit words."""
    array: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.int64).numpy()
    return array


def content(count: int, operation: int, place: int) -> np.ndarray[Any, Any]:
    """The words of an argument or a result: different in each word of each tensor."""
    return np.arange(count, dtype=np.int64) + ((operation << 20 | place) << 32)


def write_content(tensor: torch.Tensor, operation: int, place: int) -> None:
    """Fill a tensor with its content."""
    array = as_words(tensor)
    array[:] = content(len(array), operation, place)


def has_content(tensor: torch.Tensor, operation: int, place: int) -> bool:
    """Whether every word is as ``write_content`` left it."""
    array = as_words(tensor)
    return bool(np.array_equal(array, content(len(array), operation, place)))


def check_result(tensor: torch.Tensor, operation: int, dtype: str) -> None:
    """Check a result's size and its first, middle and last word.

    Args:
        tensor: The result.
        operation: What was called.
        dtype: The name of the activations' dtype.

    Raises:
        RuntimeError: It is not what the server holds.
    """
    array = as_words(tensor)
    first = (operation << 20 | RESULT) << 32
    expected = [first, first + len(array) // 2, first + len(array) - 1]
    found = [int(array[place]) for place in (0, len(array) // 2, -1)]
    if array.nbytes != OPERATIONS[operation].received_bytes(DTYPES[dtype]) or found != expected:
        raise RuntimeError(f"wrong result of {OPERATIONS[operation].name}")


def check_whole_result(tensor: torch.Tensor, operation: int, dtype: str) -> None:
    """Check a result's size and every word.

    Args:
        tensor: The result.
        operation: What was called.
        dtype: The name of the activations' dtype.

    Raises:
        RuntimeError: It is not what the server holds.
    """
    check_result(tensor, operation, dtype)
    if not has_content(tensor, operation, RESULT):
        raise RuntimeError(f"wrong words in the result of {OPERATIONS[operation].name}")


def check_arguments(operation: int, arguments: list[torch.Tensor]) -> None:
    """In the server: check every word.

    Raises:
        RuntimeError: An argument is not what was sent.
    """
    for place, tensor in enumerate(arguments):
        if not has_content(tensor, operation, place):
            raise RuntimeError(f"wrong argument of {OPERATIONS[operation].name}")
