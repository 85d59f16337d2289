"""Checks that a configuration describes a Llama that can be computed, before anything is allocated by its sizes.

Sizes are checked as they stand in the file, before transformers computes with them. ``Checkpoint`` then compares them
with the shapes of the weights. Rotary positions are tried last.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..errors import CheckpointError
from .files import one_line

_LIMIT = 1 << 31
_SIZES = {
    "num_hidden_layers": _LIMIT,
    "hidden_size": _LIMIT,
    "intermediate_size": _LIMIT,
    "num_attention_heads": _LIMIT,
    "num_key_value_heads": _LIMIT,
    "head_dim": _LIMIT,
    "vocab_size": _LIMIT,
    "max_position_embeddings": _LIMIT,
    "num_labels": 1 << 16,  # of a classifier: transformers builds a list of this length for every model
}
"""The upper limit of each size, exclusive."""
_QUANTISATIONS = ("quantization_config", "compression_config")


def check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Check the values of a file, as far as they are given; None means transformers' default.

    Raises:
        CheckpointError: a size is not a whole number within its limits, or the weights are quantised.
    """
    for name in _QUANTISATIONS:
        _refuse_quantisation(path, name, values.get(name))
    for name, limit in _SIZES.items():
        value = values.get(name)
        if value is not None and not (type(value) is int and 1 <= value < limit):
            raise CheckpointError(
                f"{path} gives its {name} as {reprlib.repr(value)}; it must be a whole number from 1 to {limit - 1}"
            )


def check_config(path: Path, config: LlamaConfig) -> None:
    """Check a configuration without its weights.

    Raises:
        CheckpointError: it describes no Llama that can be computed, or one whose weights are quantised.
    """
    check_values(path, {name: getattr(config, name, None) for name in (*_QUANTISATIONS, *_SIZES)})
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{path} has {config.num_attention_heads} query heads, which {config.num_key_value_heads} key/value heads "
            "can't share evenly"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{path} has a head_dim of {config.head_dim}; rotary positions need an even one")
    if config.hidden_act not in ACT2FN:
        raise CheckpointError(f"{path} has the unknown activation {config.hidden_act!r}")
    if not (math.isfinite(config.rms_norm_eps) and config.rms_norm_eps >= 0):
        raise CheckpointError(f"{path} has an rms_norm_eps of {config.rms_norm_eps}; it must not be below zero")
    if not (config.dtype is None or isinstance(config.dtype, torch.dtype)):
        raise CheckpointError(f"{path} has the unknown dtype {reprlib.repr(config.dtype)}")
    padding, vocabulary = config.pad_token_id, config.vocab_size
    if padding is not None and not -vocabulary <= padding < vocabulary:
        raise CheckpointError(
            f"{path} has a pad_token_id of {padding}, beyond its {vocabulary} tokens: set it to null or to one of them"
        )


def _refuse_quantisation(path: Path, field: str, value: Any) -> None:
    if not value:
        return
    method = value.get("quant_method") if isinstance(value, dict) else None
    raise CheckpointError(
        f"{path} is quantised by {reprlib.repr(method or 'a method without a name')} ({field} in its configuration), "
        "which is not supported: use the unquantised model, or a GGUF file"
    )


def check_rotary(path: Path, config: LlamaConfig) -> None:
    """Compute rotary positions for the first and the last position, as both sides will.

    Raises:
        CheckpointError: transformers fails, returns numbers that are not finite, or does not rotate whole heads.
    """
    said = reprlib.repr(config.rope_parameters)
    try:
        if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{path} rotates a part of each head, which is not supported: {said}")
        rotary = LlamaRotaryEmbedding(config)
        for last in (0, config.max_position_embeddings - 1):
            cos, sin = rotary(torch.zeros(1), torch.tensor([[0, last]]))
            if cos.shape[-1] != config.head_dim or not (torch.isfinite(cos).all() and torch.isfinite(sin).all()):
                raise ValueError(f"they are not {config.head_dim} finite numbers at position {last}")
    except CheckpointError:
        raise
    except Exception as error:  # wrong parameters may raise anything in transformers
        raise CheckpointError(f"the rotary positions of {path} can't be computed: {one_line(error)}; {said}") from error
