"""Executes several chunks of a prompt in turn, so that this side and the worker compute at the same time.

While the worker runs one chunk's operation, this side continues with the next chunk. Tokens attend only to earlier
ones, so all that a chunk needs from the others are the keys and values of the chunks before it, layer by layer. Chunks
take turns in their order, one operation each; so a chunk has cached its keys and values in a layer before the next one
attends there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..model.program import Program, WorkerOp

FEWEST_TOKENS = 16
"""The fewest tokens of a chunk: with fewer, the calls cost more than the overlap gains."""

Finish = Callable[[], torch.Tensor]


def split_prompt(tokens: int, chunks: int) -> list[slice]:
    """Split a prompt of ``tokens`` tokens into up to ``chunks`` chunks of about the same length."""
    count = max(min(chunks, tokens // FEWEST_TOKENS), 1)
    ends = [tokens * (index + 1) // count for index in range(count)]
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def execute_in_turn(programs: Sequence[Program], begin: Callable[[WorkerOp], Finish]) -> list[torch.Tensor]:
    """Execute several programs to their ends, one operation each in turn.

    ``begin`` starts an operation and returns the function that waits for its result.
    """
    results: dict[int, torch.Tensor] = {}
    in_flight = deque((index, begin(next(program))) for index, program in enumerate(programs))
    while in_flight:
        index, finish = in_flight.popleft()
        try:
            op = programs[index].send(finish())
        except StopIteration as end:
            results[index] = end.value
        else:
            in_flight.append((index, begin(op)))
    return [results[index] for index in range(len(programs))]
