"""torch's dtypes and devices, by the names that users give them."""

from __future__ import annotations

import torch

from ..errors import LlamaSplitError
from . import choices

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in choices.DTYPES}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
WORKER_DTYPE_NAMES = {**DTYPE_NAMES, torch.int8: choices.INTEGERS}
"""What workers may compute in."""


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a dtype for weights, arithmetic or wire, given by name or as it is.

    Raises:
        LlamaSplitError: it is not supported.
    """
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPE_NAMES:
        raise choices.unsupported_dtype(dtype)
    return chosen


def parse_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        LlamaSplitError: it is not supported, or this machine does not have it.
    """
    try:
        device = torch.device(f"cuda:{name}" if name.isdecimal() else name)
    except RuntimeError as error:
        raise LlamaSplitError(f"device {name!r} is not known; choose cpu or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise LlamaSplitError(f"device {name!r} is not supported; choose cpu or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LlamaSplitError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
