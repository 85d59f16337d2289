"""The interface of a shield, and its report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ..boundary.compute import WORKER_DTYPE_NAMES
from ..boundary.operations import OPERATIONS, Mode
from ..checkpoint import Checkpoint, Progress
from ..errors import LlamaSplitError
from ..model.program import WorkerOp

VERIFIED, MASKED, NEITHER = "verified", "masked and verified", "neither"
"""What became of an operation."""


@dataclass(frozen=True)
class ShieldReport:
    """What a shield has done since it was last asked.

    Attributes:
        name: the shield's.
        treated: for each operation that was executed, by name, what became of it.
        rows: how many rows of each operation's results there were.
        bound: what holds for them, in words.
    """

    name: str
    treated: Mapping[str, str]
    rows: Mapping[str, int]
    bound: str


class Covered(NamedTuple):
    """An operation under a shield.

    ``op`` is what the worker is sent. ``uncover`` turns its result, which may lie in memory of the worker's, into the
    one that the model goes on with, in memory of this process.
    """

    op: WorkerOp
    uncover: Callable[[torch.Tensor], torch.Tensor]


class Shield(ABC):
    """Stands between a model and its workers, on the trusted side.

    The model writes all arguments of operations into memory of this process, never into an arena, where a worker could
    change them. A subclass that is registered as an entry point of the group ``llama_split.shields`` can be chosen by
    its entry point's name; it is made without arguments.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[Mode, ...]] = (Mode.OP, Mode.FUSED)
    """The splits that it works with. Others do more than linear operations on the worker."""
    computes: ClassVar[torch.dtype | None] = None
    """The dtype that workers must compute in. None: the model's."""
    crosses: ClassVar[torch.dtype | None] = None
    """The dtype of what crosses. None: as the user chooses; then arguments reach ``cover`` in that dtype."""
    reveals: ClassVar[str | None] = None
    """What workers see, in words. None: what the mode reveals."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()

    @abstractmethod
    def load(
        self, checkpoint: Checkpoint, compute: torch.dtype, wire: torch.dtype, progress: Progress | None = None
    ) -> None:
        """Prepare for a model; where that fails, hold nothing that would have to be closed.

        Args:
            checkpoint: its files.
            compute: the dtype that workers compute in.
            wire: the dtype of what crosses.
            progress: called with how many matrices are done, of how many.
        """

    @abstractmethod
    def cover(self, op: WorkerOp) -> Covered:
        """Take an operation that is about to be sent."""

    @abstractmethod
    def treatment(self, operation: str) -> str:
        """Return what becomes of an operation: ``VERIFIED``, ``MASKED`` or ``NEITHER``."""

    @property
    @abstractmethod
    def bound(self) -> str:
        """What holds for what it has treated, in words."""

    def dtype_of_workers(self, given: str) -> str:
        """The name of the dtype that workers must compute in, if ``given`` is the model's."""
        return given if self.computes is None else WORKER_DTYPE_NAMES[self.computes]

    def check_wire(self, given: str | torch.dtype | None) -> None:
        """Refuse a dtype for what crosses where the shield has its own.

        Raises:
            LlamaSplitError: one is given.
        """
        if given is not None and self.crosses is not None:
            crosses = str(self.crosses).removeprefix("torch.")
            raise LlamaSplitError(
                f"the shield {self.name} sends {crosses}, so a wire dtype has no effect: leave it out"
            )

    def settle(self) -> None:  # noqa: B027 - a shield need not put anything off
        """Finish what was put off; called before anything that was computed from results is shown.

        Raises:
            WorkerTampered: a result was wrong.
        """

    def give_up(self) -> None:
        """A forward has failed: check what it has used, and forget the rest of it.

        Raises:
            WorkerTampered: a result was wrong.
        """
        self.settle()

    def work(self) -> None:  # noqa: B027 - as ``settle``
        """Do what can be done while a worker computes; called when an operation has been sent, before it is waited for.

        Raises:
            WorkerTampered: an earlier result was wrong.
        """

    def close(self) -> None:  # noqa: B027 - a shield need not hold anything
        """End with the model: give back files and wipe secrets."""

    def count(self, op: WorkerOp) -> None:
        """Count an operation for the report."""
        shape = op.arguments[0].shape
        self._rows[op.operation.name] += shape[0] * shape[1]

    def report(self) -> ShieldReport:
        """Return what was done since this was last asked, for example in one generation."""
        rows, self._rows = self._rows, Counter()
        return ShieldReport(self.name, {name: self.treatment(name) for name in rows}, dict(rows), self.bound)


def belongs_to_another() -> LlamaSplitError:
    """The error for a shield that is loaded a second time."""
    return LlamaSplitError("a shield belongs to one model: make another one for this")


def is_linear(operation: str) -> bool:
    """Whether the operation of this name is linear in its first argument."""
    return any(one.is_linear for one in OPERATIONS if one.name == operation)
