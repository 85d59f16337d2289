"""The scaling of rotary positions as GGUF files describe it, in transformers' terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError

FREQUENCY_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp divides the inverse frequencies; how Llama 3.1 and later scale."""

_SUPPORTED = f"none, linear, yarn and factors for each frequency ({FREQUENCY_FACTORS}, as Llama 3.1 has) are supported"
_PREFIX = "llama.rope.scaling."
# Llama 3.1 to 3.3 differ in the factor alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Fields of YaRN beyond transformers', with the values at which they change nothing.
_NEUTRAL = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}

Factors = np.ndarray[Any, np.dtype[np.float32]]


def rope_parameters(
    path: Path, field: Callable[..., Any], factors: Factors | None, head_dim: int, context: int
) -> dict[str, Any]:
    """``LlamaConfig.rope_parameters`` of a GGUF file.

    ``field`` gives a field's value by its name and a default; ``factors`` are those of ``FREQUENCY_FACTORS``, if the
    file has them; ``context`` is the file's context length in tokens.

    Raises:
        CheckpointError: the file scales in another way, or in two ways.
    """
    theta = field("llama.rope.freq_base", 10000.0)
    # As in llama.cpp: a factor of zero says nothing, and a factor without a type is a linear one.
    factor = field(_PREFIX + "factor", field("llama.rope.scale_linear", 0.0)) or 1.0
    kind = field(_PREFIX + "type", "linear")
    if kind == "linear" and factor == 1.0:
        kind = "none"
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{path} scales its rotary positions by {kind!r}; {_SUPPORTED}")
    if not (math.isfinite(factor) and factor >= 1.0):
        raise CheckpointError(f"{path} scales its rotary positions by a factor of {factor}; it must be 1 or more")
    if factors is not None:
        if kind != "none":
            raise CheckpointError(f"{path} scales its rotary positions by {kind!r} and {FREQUENCY_FACTORS} at once")
        return _from_factors(path, factors, theta, head_dim, context)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
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
    if stretched != 1.0:  # llama.cpp multiplies it with what transformers has as its default
        found["attention_factor"] = stretched * (0.1 * math.log(factor) + 1.0)
    return found


def _from_factors(path: Path, factors: Factors, theta: float, head_dim: int, context: int) -> dict[str, Any]:
    """Llama 3's parameters if the factors are what they give, else the factors themselves.

    Only the former have the fingerprint of the same model in safetensors. transformers' "longrope" is nothing but
    factors for each frequency, if those for short and long contexts are the same.
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
    """What Llama 3's scaling divides each inverse frequency by: 1 for short waves, the factor for long ones."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    kept = np.clip(smooth, 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - kept) / rope["factor"] + kept))
