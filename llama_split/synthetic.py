"""Models of well-known shapes with random weights, for benchmarks and trials where there is no checkpoint.

Both sides make the same weights from the shape's name and the seed. The text that such a model gives means nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checkpoint import EMBEDDING, FINAL_NORM, LAYER_NORMS, LM_HEAD, Checkpoint, layer_name
from .errors import CheckpointError

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
}

_LAYER_MATRICES = (
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
)
# A prime: no matrix has rows of this length, so that each row holds other numbers than its neighbours.
_POOL_NUMBERS = 1_048_583
_DEVIATION = 0.02  # as Llama's weights are initialised


class RandomCheckpoint(Checkpoint):
    """A model of one of ``SHAPES`` whose weights follow from ``seed``.

    Every matrix is filled from one pool of normally distributed numbers, from a place of its own on: as fast as
    copying, and random enough for whatever does not learn from it.

    Raises:
        CheckpointError: there is no shape of this name.
    """

    def __init__(self, name: str, seed: int = 0, **overrides: Any) -> None:
        if name not in SHAPES:
            raise CheckpointError(f"there is no shape {name!r} for random weights; choose one of {', '.join(SHAPES)}")
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = LlamaConfig(**{**SHAPES[name], "rms_norm_eps": 1e-5, **ends, **overrides})
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
        """A tensor's numbers from ``start`` to ``stop``: the pool's, over and over, from a place of its own on."""
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        begin = (int.from_bytes(digest[:8], "little") % _POOL_NUMBERS + start) % _POOL_NUMBERS
        end = begin + stop - start
        pieces = [self._pool[max(0, begin - at) : end - at] for at in range(0, end, _POOL_NUMBERS)]
        return torch.cat(pieces)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        """A token for each byte; what the model says in others has no text."""
        alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
