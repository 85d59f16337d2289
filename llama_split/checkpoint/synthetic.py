"""Models of well-known shapes with random weights, for benchmarks and trials without a checkpoint.

Both sides derive the same weights from the shape's name and the seed. The text that such a model generates is
meaningless.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .base import Checkpoint
from .outline import EMBEDDING, FINAL_NORM, LAYER_NORMS, LM_HEAD, layer_name
from .shapes import shape_values

_LAYER_MATRICES = (
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
)
# A prime: no matrix has rows of this length, so neighbouring rows hold different numbers.
_POOL_NUMBERS = 1_048_583
_DEVIATION = 0.02  # as in the initialisation of Llama's weights


class RandomCheckpoint(Checkpoint):
    """A model with random weights.

    All matrices are filled from one pool of normally distributed numbers, each starting at a place of its own: as fast
    as copying, and random enough for anything that does not train on it.

    Args:
        name: one of ``shapes.SHAPES``.
        seed: determines the weights.
        overrides: values of the configuration that replace the shape's.

    Raises:
        CheckpointError: there is no shape of this name.
    """

    def __init__(self, name: str, seed: int = 0, **overrides: Any) -> None:
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = LlamaConfig(**{**shape_values(name), "rms_norm_eps": 1e-5, **ends, **overrides})
        super().__init__(Path(f"{name} with random weights, seed {seed}"), config)
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL_NUMBERS, generator=generator) * _DEVIATION

    @property
    def names(self) -> frozenset[str]:
        layers = range(self.geometry.layers)
        head = [] if self.config.tie_word_embeddings else [LM_HEAD]
        return frozenset(
            [
                EMBEDDING,
                FINAL_NORM,
                *head,
                *(layer_name(i, part) for i in layers for part in (*LAYER_NORMS, *_LAYER_MATRICES)),
            ]
        )

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self.shape(name)

    def rows(self, name: str, start: int, stop: int, step: int = 1) -> torch.Tensor:
        _, *width = self.shape(name)
        if not width:  # a norm
            return torch.ones(len(range(start, stop, step)))
        if step == 1:
            return self._numbers(name, start * width[0], stop * width[0]).view(-1, width[0])
        return torch.cat([self.rows(name, row, row + 1) for row in range(start, stop, step)])

    def _unreadable(self, name: str) -> None:
        return None

    def _stored_dtype(self) -> torch.dtype:
        return torch.float32

    def _numbers(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A tensor's numbers from ``start`` to ``stop``: the pool's in a loop, starting at a place of its own."""
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        begin = (int.from_bytes(digest[:8], "little") % _POOL_NUMBERS + start) % _POOL_NUMBERS
        end = begin + stop - start
        pieces = [self._pool[max(0, begin - at) : end - at] for at in range(0, end, _POOL_NUMBERS)]
        return torch.cat(pieces)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer with one token per byte; the model's other tokens have no text."""
        alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
