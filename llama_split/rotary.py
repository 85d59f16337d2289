"""Rotary positions (Su et al. 2021), where the frequencies may depend on how long the text is.

transformers' own module remembers the longest text that it has seen. Here that memory is apart, in ``TextLengths``:
the trusted side has one for each model and tells the worker the length of each token. ``Rotary`` has none, so that
sessions and clients can share it, and tokens that are cached again get the frequencies that they had.

Shape suffixes: B batch, T tokens, d head_dim, F half of it.
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def _kind(config: LlamaConfig) -> str | None:
    """Which scaling depends on the length of the text: "dynamic" or "longrope", or None."""
    name = config.rope_parameters["rope_type"]
    return "dynamic" if "dynamic" in name else name if name == "longrope" else None


class Rotary:
    """Cosines and sines of positions; without state."""

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self._config = copy.deepcopy(config)  # a caller may change what a model shows
        self._device = device
        with torch.device("cpu"):  # as transformers, which moves it afterwards
            built = LlamaRotaryEmbedding(self._config)
        self._own_frequencies_F: torch.Tensor = built.inv_freq.to(device)
        self._scaling = built.attention_scaling
        kind = _kind(config)
        self._by_length = None if kind is None else ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        self._own_length = (
            config.rope_parameters["original_max_position_embeddings"]
            if kind == "longrope"
            else config.max_position_embeddings
        )

    @property
    def needs_lengths(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self._by_length is not None

    def __call__(
        self, positions_BT: torch.Tensor, dtype: torch.dtype, lengths_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [B, T, d] each. ``lengths_T`` is the length of the text that each token was first part of.

        Raises:
            ValueError: the frequencies depend on lengths, and none are given.
        """
        angles_BTF = positions_BT[..., None].float() * self._frequencies(lengths_T)
        angles_BTd = torch.cat((angles_BTF, angles_BTF), dim=-1)
        return (angles_BTd.cos() * self._scaling).to(dtype), (angles_BTd.sin() * self._scaling).to(dtype)

    def _frequencies(self, lengths_T: torch.Tensor | None) -> torch.Tensor:
        """[F] for all tokens, or [T, F]."""
        if self._by_length is None:
            return self._own_frequencies_F
        if lengths_T is None:
            raise ValueError("this model's rotary frequencies depend on the length of the text, which is missing")
        different, tokens = torch.unique(lengths_T, return_inverse=True)
        return torch.stack([self._for_length(length) for length in different])[tokens.to(self._device)]

    def _for_length(self, length: torch.Tensor) -> torch.Tensor:
        if self._by_length is None or length <= self._own_length:
            return self._own_frequencies_F
        frequencies_F: torch.Tensor
        frequencies_F, _ = self._by_length(self._config, self._device, seq_len=length.to(self._device))
        return frequencies_F


class TextLengths:
    """The length that each forward's frequencies are made for, as transformers chooses it.

    "longrope" goes by the forward's last position. "dynamic" never goes back to a shorter length, until a forward that
    stays within the model's own. It belongs to a model, as in transformers, and not to a text.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._kind = _kind(config)
        self._own_length = config.max_position_embeddings
        self._longest = self._own_length

    def of(self, positions_BT: torch.Tensor) -> torch.Tensor | None:
        """[T] for the next forward, the same for each token; None where frequencies don't depend on it."""
        if self._kind is None:
            return None
        length = positions_BT.max().item() + 1
        if self._kind == "dynamic":
            if length > self._longest:
                self._longest = length
            elif length < self._own_length:
                self._longest = self._own_length
            length = self._longest
        return torch.full(positions_BT.shape[-1:], length)
