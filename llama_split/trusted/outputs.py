"""What a forward returns: its logits, and on request hidden states and attention weights, as in transformers.

Shape suffixes: B batch, T tokens, S all tokens attended to, H heads, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig

from ..boundary.operations import Mode
from ..errors import UnsupportedBySplit, WorkerMismatch


def private_logits(logits: torch.Tensor, dtype: torch.dtype, worker: str) -> torch.Tensor:
    """Copy logits to where the worker can't change them, and check that all of them are finite.

    Args:
        logits: the worker's result, of any shape.
        dtype: of the copy.
        worker: the worker's address, for the error.

    Raises:
        WorkerMismatch: some are infinite or NaN; generation would continue with an arbitrary token.
    """
    private = logits.to(dtype, copy=True)
    if private.numel() and not all(math.isfinite(bound) for bound in private.aminmax()):
        raise WorkerMismatch(
            f"the worker at {worker} returned logits that are infinite or NaN: it is broken or hostile, or the weights "
            f"or inputs are too large for {str(dtype).removeprefix('torch.')}"
        )
    return private


class RequestedOutputs:
    """Collects the hidden states and attention weights that a caller has asked for.

    Hidden states are the embeddings, then the result of each layer, the last one after the final norm: [B, T, D] each.
    ``attentions`` is a list for the weights [B, H, T, S] of each layer, or None if they are not requested.
    """

    def __init__(self, hidden_states: bool, attentions: bool) -> None:
        self.wants_hidden = hidden_states
        self.attentions: list[torch.Tensor] | None = [] if attentions else None
        self._hidden: list[torch.Tensor] = []
        self._chunks: list[list[torch.Tensor]] = []

    @classmethod
    def of(
        cls, config: LlamaConfig, mode: Mode, hidden_states: bool | None, attentions: bool | None
    ) -> RequestedOutputs:
        """Collects what a caller of a forward asks for.

        Args:
            config: the model's configuration.
            mode: the split.
            hidden_states: return hidden states. None: what ``config`` says.
            attentions: return attention weights. None: what ``config`` says.

        Raises:
            UnsupportedBySplit: this split never has them on the trusted side.
        """
        hidden_states = config.output_hidden_states if hidden_states is None else hidden_states
        attentions = config.output_attentions if attentions is None else attentions
        if hidden_states and mode is Mode.STACK:
            raise UnsupportedBySplit("output_hidden_states: in mode stack they never leave the worker; use mode layer")
        if attentions and mode.worker_keeps_kv:
            raise UnsupportedBySplit(
                f"output_attentions: in mode {mode.value} the worker attends; use mode fused or op"
            )
        return cls(bool(hidden_states), bool(attentions))

    @property
    def anything(self) -> bool:
        """True if anything is requested."""
        return self.wants_hidden or self.attentions is not None

    def add(self, hidden: Sequence[torch.Tensor]) -> None:
        """Take the next layers' hidden states, of all tokens."""
        if self.wants_hidden:
            self._hidden += hidden

    def chunk_adder(self, dtype: torch.dtype) -> Callable[[list[torch.Tensor]], None] | None:
        """Return a callback that takes every layer's hidden states chunk by chunk; None if they are not requested."""
        if not self.wants_hidden:
            return None
        return lambda hidden: self._chunks.append([each.to(dtype) for each in hidden])

    def replace_last(self, normed: torch.Tensor) -> None:
        """Join the chunks, and replace the last layer's hidden states by those after the final norm."""
        self._hidden += [torch.cat(chunks, dim=1) for chunks in zip(*self._chunks, strict=True)]
        self._hidden[-1] = normed

    def hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        """All hidden states, the embeddings first; None if they are not requested."""
        return tuple(self._hidden) if self.wants_hidden else None
