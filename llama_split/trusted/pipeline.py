"""Several parts of a prompt under way together, so that this side and the worker compute at the same time.

While the worker makes one part's product, this side goes on with the next part. Tokens attend to earlier ones only,
so what a part needs of the others are the keys and values of those before it, layer by layer. Parts take turns in
their order, step by step; so a part has cached its own in a layer before the next one attends there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..steps import Step, Steps

FEWEST_TOKENS = 16
"""A part has at least so many: with fewer, the calls cost more than what is gained."""

Finish = Callable[[], torch.Tensor]


def cut(tokens: int, parts: int) -> list[slice]:
    """A prompt of so many tokens in up to ``parts`` parts of about the same length."""
    count = max(min(parts, tokens // FEWEST_TOKENS), 1)
    ends = [tokens * (index + 1) // count for index in range(count)]
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def run_in_turn(forwards: Sequence[Steps], begin: Callable[[Step], Finish]) -> list[torch.Tensor]:
    """Drive several forwards to their ends, a step each in turn; what ``begin`` returns waits for a step's result."""
    results: dict[int, torch.Tensor] = {}
    under_way = deque((index, begin(next(steps))) for index, steps in enumerate(forwards))
    while under_way:
        index, finish = under_way.popleft()
        try:
            step = forwards[index].send(finish())
        except StopIteration as end:
            results[index] = end.value
        else:
            under_way.append((index, begin(step)))
    return [results[index] for index in range(len(forwards))]
