"""The memory that ``llama-split info`` reports is what the two sides hold."""

from __future__ import annotations

import pytest
import torch

from llama_split.boundary.choices import default_arena_bytes
from llama_split.boundary.operations import Mode
from llama_split.checkpoint import open_checkpoint
from llama_split.commands.footprint import footprint
from llama_split.model.kv_cache import GrowingCache
from llama_split.trusted.part import TrustedPart
from llama_split.worker.weights import Weights
from tests.support.llamas import Small


@pytest.mark.parametrize("split", list(Mode))
def test_memory_is_what_both_sides_hold(small: Small, split: Mode) -> None:
    """Weights of both sides, biases and tied matrices included, and the KV cache."""
    checkpoint = open_checkpoint(str(small.path))
    found = footprint(checkpoint.outline, split, torch.bfloat16, torch.float32, 8)
    weights = Weights(checkpoint, torch.bfloat16, torch.device("cpu"), embedding=split is Mode.OP)
    assert found.worker_weights == weights.nbytes
    with torch.device("meta"):
        trusted = TrustedPart(checkpoint.config, split, None)
    assert found.trusted_weights == 2 * sum(parameter.numel() for parameter in trusted.parameters())
    geometry = checkpoint.geometry
    cache = GrowingCache(geometry.layers, 200)
    keys = torch.zeros(1, geometry.kv_heads, 200, geometry.head_dim, dtype=torch.bfloat16)
    for layer in range(geometry.layers):
        cache.update(keys, keys, layer)
    assert found.kv_per_token * 200 == cache.nbytes
    assert found.arena == default_arena_bytes(geometry, split, torch.float32)
    assert found.kv_holder == ("worker" if split.worker_keeps_kv else "trusted")
