"""The sizes of a Llama from which the shape of every tensor that crosses follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}
"""transformers' names of the sizes."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Geometry:
        """The sizes that a configuration states."""
        return cls.of_values({name: getattr(config, name) for name in _FIELDS.values()})

    @classmethod
    def of_values(cls, values: Mapping[str, int]) -> Geometry:
        """The sizes by transformers' names."""
        return cls(**{own: values[name] for own, name in _FIELDS.items()})

    @property
    def query_width(self) -> int:
        """Elements of all query heads of a token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of all key heads of a token, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def widths(self) -> dict[str, int]:
        """The dimensions that the model fixes, by the letters of ``operations``."""
        return {
            "d": self.head_dim,
            "D": self.hidden,
            "Q": self.query_width,
            "Q+2K": self.query_width + 2 * self.kv_width,
            "I": self.intermediate,
            "2I": 2 * self.intermediate,
            "V": self.vocab,
        }
