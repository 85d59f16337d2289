"""A forward as a program: a generator that yields operations and is sent their results.

Each layer is written once, as such a program. Where its operations run depends on what executes it: the trusted side
sends each operation to the worker; the worker runs whole layers by itself. A program waits only at a ``yield``, so
several programs can be executed in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from ..boundary.operations import Operation


class WorkerOp(NamedTuple):
    """One use of an operation: which one, the layer whose weights it takes, and its arguments."""

    operation: Operation
    layer: int
    arguments: tuple[torch.Tensor, ...]


Op = TypeVar("Op")
Program = Generator[WorkerOp, torch.Tensor, torch.Tensor]
"""Yields operations, is sent the result of each, and returns the result of the whole."""


def execute(
    program: Generator[Op, torch.Tensor, torch.Tensor], execute_op: Callable[[Op], torch.Tensor]
) -> torch.Tensor:
    """Execute a program, this kind or another, to its end, one operation after the other."""
    try:
        op = next(program)
        while True:
            op = program.send(execute_op(op))
    except StopIteration as end:
        result: torch.Tensor = end.value
        return result


class Workspace(Protocol):
    """Where a program writes the arguments of its operations."""

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """Uninitialised memory for an argument, in the dtype that the operation takes."""

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor from elsewhere as an argument: contiguous, and copied at most once."""


class HeapWorkspace:
    """A workspace in ordinary memory, for operations that this process runs itself."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=self._dtype, device=self._device)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous()
