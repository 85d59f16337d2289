"""Translates a GGUF file's scaling of rotary positions to transformers' parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError

FREQUENCY_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp divides the inverse frequencies; Llama 3.1 and later scale this way."""

_SUPPORTED = f"none, linear, yarn and factors for each frequency ({FREQUENCY_FACTORS}, as Llama 3.1 has) are supported"
_PREFIX = "llama.rope.scaling."
# Llama 3.1 to 3.3 differ only in the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Fields of YaRN that transformers does not have, with the values that change nothing.
_NEUTRAL = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}

Factors = np.ndarray[Any, np.dtype[np.float32]]


def rope_parameters(
    path: Path, field: Callable[..., Any], factors: Factors | None, head_dim: int, context: int
) -> dict[str, Any]:
    """The ``LlamaConfig.rope_parameters`` of a GGUF file.

    Args:
        path: the file, for errors.
        field: returns a field's value by its name, or a default.
        factors: the tensor ``FREQUENCY_FACTORS``; None: the file has none.
        head_dim: the width of a head.
        context: the file's context length in tokens.

    Raises:
        CheckpointError: the file's scaling is not supported, or it has two.
    """
    theta = field("llama.rope.freq_base", 10000.0)
    # As in llama.cpp: a factor of zero means none, and a factor without a type is linear.
    factor = field(_PREFIX + "factor", field("llama.rope.scale_linear", 0.0)) or 1.0
    scaling = field(_PREFIX + "type", "linear")
    if scaling == "linear" and factor == 1.0:
        scaling = "none"
    if scaling not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{path} scales its rotary positions by {scaling!r}; {_SUPPORTED}")
    if not (math.isfinite(factor) and factor >= 1.0):
        raise CheckpointError(f"{path} scales its rotary positions by a factor of {factor}; it must be 1 or more")
    if factors is not None:
        if scaling != "none":
            raise CheckpointError(f"{path} scales its rotary positions by {scaling!r} and {FREQUENCY_FACTORS} at once")
        return _from_factors(path, factors, theta, head_dim, context)
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **_yarn(path, field, factor, context)}
    return {"rope_type": "default", "rope_theta": theta}


def _yarn(path: Path, field: Callable[..., Any], factor: float, context: int) -> dict[str, Any]:
    for name, neutral in _NEUTRAL.items():
        value = field(_PREFIX + name, neutral)
        if value != neutral:
            raise CheckpointError(f"{path} has {_PREFIX}{name} {value}; only {neutral} is supported")
    found: dict[str, Any] = {
        "original_max_position_embeddings": field(_PREFIX + "original_context_length", 0) or context
    }
    for name in ("beta_fast", "beta_slow"):
        value = field(f"{_PREFIX}yarn_{name}")
        if value is not None:
            found[name] = value
    stretched = field(_PREFIX + "attn_factor", 1.0)
    if stretched != 1.0:  # llama.cpp multiplies it by transformers' default
        found["attention_factor"] = stretched * (0.1 * math.log(factor) + 1.0)
    return found


def _from_factors(path: Path, factors: Factors, theta: float, head_dim: int, context: int) -> dict[str, Any]:
    """Llama 3's parameters if they yield these factors, else the factors themselves.

    Only the former give the file the fingerprint of the same model in safetensors. transformers' "longrope" with the
    same factors for short and long contexts divides each frequency by its factor and does nothing else.
    """
    if len(factors) != head_dim // 2 or not np.all(np.isfinite(factors) & (factors > 0)):
        raise CheckpointError(
            f"{path} has {len(factors)} factors in {FREQUENCY_FACTORS}, or some that are not positive"
        )
    largest = float(factors.max())
    llama3 = {"rope_type": "llama3", "rope_theta": theta, "factor": largest, **_LLAMA3}
    if largest > 1 and np.allclose(factors, _llama3_factors(llama3, head_dim), rtol=1e-5, atol=0.0):
        return llama3
    listed = [float(factor) for factor in factors]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Llama 3's divisors of the inverse frequencies: 1 for short waves, the factor for long ones."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    kept = np.clip(smooth, 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - kept) / rope["factor"] + kept))
