"""A forward's single products, and how a forward that yields them is run.

Each ``yield`` of a ``Step`` is the one point at which a forward can wait, so that several forwards can be run in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .operations import Operation


@dataclass(frozen=True)
class Step:
    """One product to be made: ``operation`` of ``layer`` on ``arguments``."""

    operation: Operation
    layer: int
    arguments: tuple[torch.Tensor, ...]


Steps = Generator[Step, torch.Tensor, torch.Tensor]


def run(steps: Steps, perform: Callable[[Step], torch.Tensor]) -> torch.Tensor:
    """Drive one forward to its end, making each step at once."""
    try:
        step = next(steps)
        while True:
            step = steps.send(perform(step))
    except StopIteration as end:
        result: torch.Tensor = end.value
        return result


class Workspace(Protocol):
    """Where the arguments of steps are made."""

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """Memory for an argument, of the dtype that it is wanted in."""

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that was made elsewhere as an argument: contiguous, and copied once at most."""


class Memory:
    """Ordinary memory of one device and dtype: the workspace of whoever makes the steps itself."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=self._dtype, device=self._device)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous()
