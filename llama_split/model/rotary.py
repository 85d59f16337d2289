"""Rotary positions (Su et al. 2021), with frequencies that may depend on the length of the text.

A head's two halves are the two coordinates of its pairs, as in transformers.

transformers' own module remembers the longest text it has seen. Here that memory stands apart, in ``TextLengths``: the
trusted side keeps one per model and sends the worker a length for each token. ``Rotary`` is stateless, so sessions and
clients can share it, and tokens that are cached again get the same frequencies as before.

Shape suffixes: B batch, T tokens, H heads, d head_dim, F half of head_dim.
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def _length_scaling(config: LlamaConfig) -> str | None:
    """The model's scaling if it depends on the length of the text: "dynamic" or "longrope"; None otherwise."""
    name = config.rope_parameters["rope_type"]
    return "dynamic" if "dynamic" in name else name if name == "longrope" else None


def rotate(heads_BTHd: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs of each head: [B, T, H, d]. To the last bit what transformers computes.

    Args:
        heads_BTHd: queries, keys, or both side by side.
        cos_sin: as ``Rotary`` returns them.
    """
    cos_BT1d, sin_BT1d = (each[:, :, None] for each in cos_sin)
    swapped_BTHd = heads_BTHd.roll(heads_BTHd.shape[-1] // 2, -1)
    return (heads_BTHd * cos_BT1d).add_(swapped_BTHd.mul_(sin_BT1d))


class Rotary:
    """Computes the cosines and sines of positions. Stateless."""

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self._config = copy.deepcopy(config)  # callers may change a model's config
        self._device = device
        with torch.device("cpu"):  # like transformers, which moves the result afterwards
            built = LlamaRotaryEmbedding(self._config)
        self._own_frequencies_F: torch.Tensor = built.inv_freq.to(device)
        self._scaling = built.attention_scaling
        scaling = _length_scaling(config)
        self._by_length = None if scaling is None else ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        self._own_length = (
            config.rope_parameters["original_max_position_embeddings"]
            if scaling == "longrope"
            else config.max_position_embeddings
        )

    @property
    def needs_lengths(self) -> bool:
        """True if the frequencies depend on the length of the text."""
        return self._by_length is not None

    def __call__(
        self, positions_BT: torch.Tensor, dtype: torch.dtype, lengths_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``rotate`` takes: cosines and sines, [B, T, d] each; the sines of the first halves are negated.

        Args:
            positions_BT: positions; B may be 1 for all rows.
            dtype: of the results; the arithmetic is in float32.
            lengths_T: the length of the text when each token was first processed; needed if ``needs_lengths``.

        Raises:
            ValueError: lengths are needed and missing.
        """
        angles_BTF = positions_BT[..., None].float() * self._frequencies(lengths_T)
        angles_BTd = torch.cat((-angles_BTF, angles_BTF), dim=-1)
        return (angles_BTd.cos() * self._scaling).to(dtype), (angles_BTd.sin() * self._scaling).to(dtype)

    def _frequencies(self, lengths_T: torch.Tensor | None) -> torch.Tensor:
        """Inverse frequencies: [F] for all tokens, or [T, F]."""
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
    """Chooses the text length that each forward's frequencies are computed for, as transformers does.

    "longrope" takes the forward's last position. "dynamic" takes the longest length so far, and starts over with a
    forward that fits into the model's original length. As in transformers, the state belongs to the model, not to a
    text.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._scaling = _length_scaling(config)
        self._own_length = config.max_position_embeddings
        self._longest = self._own_length

    def of(self, positions_BT: torch.Tensor) -> torch.Tensor | None:
        """The length for each token of the next forward, [T]; None where frequencies don't depend on it."""
        if self._scaling is None:
            return None
        length = positions_BT.max().item() + 1
        if self._scaling == "dynamic":
            if length > self._longest:
                self._longest = length
            elif length < self._own_length:
                self._longest = self._own_length
            length = self._longest
        return torch.full(positions_BT.shape[-1:], length)
