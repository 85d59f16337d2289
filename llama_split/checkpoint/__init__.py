"""Reads a Llama's configuration and single tensors from safetensors files (sharded or not) or GGUF files.

Each side asks for the tensors it needs by transformers' parameter names. Besides these, only what the fingerprint
samples is read. Files are memory mapped, so everything else stays on disk.

Names that need torch and transformers are imported on first use: ``llama-split info`` mostly does without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import missing_package
from .outline import EMBEDDING, FINAL_NORM, LAYER_NORMS, LM_HEAD, layer_name

if TYPE_CHECKING:
    from .base import Checkpoint, Progress
    from .gguf import GgufCheckpoint
    from .opening import open_checkpoint
    from .quantised import QuantisedCheckpoint
    from .safetensors import SafetensorsCheckpoint

_HOMES = {
    "Checkpoint": "base",
    "GgufCheckpoint": "gguf",
    "Progress": "base",
    "QuantisedCheckpoint": "quantised",
    "SafetensorsCheckpoint": "safetensors",
    "open_checkpoint": "opening",
}

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "LAYER_NORMS",
    "LM_HEAD",
    "Checkpoint",
    "GgufCheckpoint",
    "Progress",
    "QuantisedCheckpoint",
    "SafetensorsCheckpoint",
    "layer_name",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            raise missing_package(error) or error from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
