"""What a forward gives: its logits, and if asked for hidden states and attention weights, as transformers does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..errors import WorkerMismatch


def private_logits(logits: torch.Tensor, dtype: torch.dtype, worker: str) -> torch.Tensor:
    """A copy of what the worker at this address returned, which it can't change any more; all of it are numbers.

    Raises:
        WorkerMismatch: they are infinite or NaN, with which generation would go on from whatever token comes first.
    """
    private = logits.to(dtype, copy=True)
    if private.numel() and not all(math.isfinite(bound) for bound in private.aminmax()):
        raise WorkerMismatch(
            f"the worker at {worker} returned logits that are infinite or NaN: it is broken or hostile, or the weights "
            f"or inputs are too large for {str(dtype).removeprefix('torch.')}"
        )
    return private


class Shown:
    """Collects what is asked for.

    Hidden states are the embeddings, then what each layer gave, the last one's after the final norm: [B, T, D] each.
    ``attentions`` is a list for each layer's weights [B, H, T, S], or None if nobody asks for them.
    """

    def __init__(self, hidden_states: bool, attentions: bool) -> None:
        self.wants_hidden = hidden_states
        self.attentions: list[torch.Tensor] | None = [] if attentions else None
        self._hidden: list[torch.Tensor] = []
        self._parts: list[list[torch.Tensor]] = []

    @property
    def anything(self) -> bool:
        """Whether something is asked for."""
        return self.wants_hidden or self.attentions is not None

    def add(self, hidden: Sequence[torch.Tensor]) -> None:
        """The next layers' hidden states, of all tokens."""
        if self.wants_hidden:
            self._hidden += hidden

    def part_adder(self, dtype: torch.dtype) -> Callable[[list[torch.Tensor]], None] | None:
        """What takes all layers' hidden states of some tokens, the next ones each time; None if nobody asks."""
        if not self.wants_hidden:
            return None
        return lambda hidden: self._parts.append([each.to(dtype) for each in hidden])

    def replace_last(self, normed: torch.Tensor) -> None:
        """The last layer's hidden states after the final norm."""
        self._hidden += [torch.cat(parts, dim=1) for parts in zip(*self._parts, strict=True)]
        self._hidden[-1] = normed

    def hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        return tuple(self._hidden) if self.wants_hidden else None
