"""Executes several chunks of a prompt in turn, so that this side and all workers compute at the same time.

While a worker runs one chunk's operation, this side continues with the next chunk. Tokens attend only to earlier
ones, so all that a chunk needs from the others are the keys and values of the chunks before it, layer by layer. Chunks
take turns in their order, one operation each; so a chunk has cached its keys and values in a layer before the next one
attends there.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Generic

import torch

from ..model.program import Op

FEWEST_TOKENS = 16
"""The fewest tokens of a chunk: with fewer, the calls cost more than the overlap gains."""

Finish = Callable[[], torch.Tensor]


def split_prompt(tokens: int, chunks: int) -> list[slice]:
    """Split a prompt of ``tokens`` tokens into up to ``chunks`` chunks of about the same length."""
    count = max(min(chunks, tokens // FEWEST_TOKENS), 1)
    ends = [tokens * (index + 1) // count for index in range(count)]
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def execute_in_turn(
    programs: Sequence[Generator[Op, torch.Tensor, torch.Tensor]],
    begin: Callable[[Op], Finish],
    place: Callable[[Op], Hashable],
    at_once: int,
) -> list[torch.Tensor]:
    """Execute several programs to their ends, one operation each in turn.

    Args:
        programs: all go through the same places in the same order.
        begin: starts an operation and returns the function that waits for its result.
        place: where an operation is executed.
        at_once: the most programs at a place. Others wait until one has moved on, so that all places are busy.
    """
    return _Turns(programs, begin, place, at_once).execute()


class _Turns(Generic[Op]):
    def __init__(
        self,
        programs: Sequence[Generator[Op, torch.Tensor, torch.Tensor]],
        begin: Callable[[Op], Finish],
        place: Callable[[Op], Hashable],
        at_once: int,
    ) -> None:
        self._programs = programs
        self._begin = begin
        self._place = place
        self._at_once = at_once
        self._in_flight: deque[tuple[int, Hashable, Finish]] = deque()
        self._present: Counter[Hashable] = Counter()
        self._waiting: defaultdict[Hashable, deque[tuple[int, Op]]] = defaultdict(deque)
        self._not_started = deque(range(len(programs)))
        self._entrance: Hashable = None  # where the first operation of all programs is executed
        self._results: dict[int, torch.Tensor] = {}

    def execute(self) -> list[torch.Tensor]:
        self._start()
        while self._in_flight:
            index, where, finish = self._in_flight.popleft()
            try:
                op = self._programs[index].send(finish())
            except StopIteration as end:
                self._results[index] = end.value
                self._leave(where)
            else:
                if self._place(op) == where:
                    self._in_flight.append((index, where, self._begin(op)))
                else:
                    self._leave(where)
                    self._arrive(index, op)
            del finish
        return [self._results[index] for index in range(len(self._programs))]

    def _start(self) -> None:
        """Start as many programs as there is room for; until then, a program takes no memory."""
        while self._not_started and (self._entrance is None or self._present[self._entrance] < self._at_once):
            index = self._not_started.popleft()
            op = next(self._programs[index])
            self._entrance = self._place(op)
            self._arrive(index, op)

    def _arrive(self, index: int, op: Op) -> None:
        where = self._place(op)
        if self._present[where] < self._at_once:
            self._present[where] += 1
            self._in_flight.append((index, where, self._begin(op)))
        else:
            self._waiting[where].append((index, op))

    def _leave(self, where: Hashable) -> None:
        self._present[where] -= 1
        if self._waiting[where]:
            self._arrive(*self._waiting[where].popleft())
        if where == self._entrance:
            self._start()
