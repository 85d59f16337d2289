"""What can be chosen: dtypes, splits, devices, and the size of the arenas that follows from them."""

from __future__ import annotations

import torch

from shmtransport import CHANNEL_KINDS, ChannelKind

from .errors import LlamaSplitError
from .operations import BY_MODE, Geometry, Mode, forward_sizes

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MOST_PIPELINED = 8
"""Parts of a prompt that may be under way together."""

_MIN_ARENA_BYTES = 16 << 20
_ARENA_TOKENS = 1024
_ARENA_LOGITS = 16  # rows of a batch that generates
_LARGEST_TENSORS_HELD = 4


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


def parse_channel(name: str) -> ChannelKind:
    """A kind of channel by its name.

    Raises:
        LlamaSplitError: there is none of this name.
    """
    for kind in CHANNEL_KINDS:
        if name == kind:
            return kind
    raise LlamaSplitError(f"channel {name!r} is not supported; choose one of {', '.join(CHANNEL_KINDS)}")


def parse_device(name: str) -> torch.device:
    """The device of this name, which must be there.

    Raises:
        LlamaSplitError: it is not.
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


def check_pipeline(parts: int, mode: Mode) -> None:
    """Refuse a number of parts that a prompt can't be cut into, or that this split has no use for.

    Raises:
        LlamaSplitError: it is none of 1 to ``MOST_PIPELINED``, or more than 1 where the worker attends.
    """
    if not 1 <= parts <= MOST_PIPELINED:
        raise LlamaSplitError(f"pipeline {parts} is not supported; choose 1 to {MOST_PIPELINED} parts")
    if parts > 1 and mode.worker_keeps_kv:
        raise LlamaSplitError(
            f"pipeline {parts}: in mode {mode.value} this side has nothing to compute meanwhile; use fused or op"
        )


def default_arena_bytes(geometry: Geometry, mode: Mode, dtype: torch.dtype) -> int:
    """Room for a few of the largest tensors of a 1024-token forward at once, in bytes.

    Longer prompts cross in several calls.
    """
    sizes = forward_sizes(geometry, _ARENA_TOKENS, logits=_ARENA_LOGITS)
    crossing = [tensor for operation in BY_MODE[mode] for tensor in (*operation.arguments, operation.result)]
    return max(_MIN_ARENA_BYTES, _LARGEST_TENSORS_HELD * max(tensor.nbytes(sizes, dtype) for tensor in crossing))
