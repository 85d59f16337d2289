"""Reads a Llama's configuration and single tensors from safetensors (sharded too) or GGUF.

Each side asks for the tensors that it needs by transformers' parameter names; beside these only the norms and rows of
the fingerprint are read. Files are memory mapped: what is not asked for stays on disk.
"""

from .base import EMBEDDING, FINAL_NORM, LAYER_NORMS, LM_HEAD, Checkpoint, Progress, layer_name
from .gguf import GgufCheckpoint
from .opening import open_checkpoint
from .safetensors import SafetensorsCheckpoint

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "LAYER_NORMS",
    "LM_HEAD",
    "Checkpoint",
    "GgufCheckpoint",
    "Progress",
    "SafetensorsCheckpoint",
    "layer_name",
    "open_checkpoint",
]
