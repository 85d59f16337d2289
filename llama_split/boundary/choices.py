"""What users can choose by name (dtype, split, channel, pipeline), and the default size of the arenas.

Nothing here imports torch, so that a command refuses a wrong name at once; ``compute`` has torch's dtypes and devices.
"""

from __future__ import annotations

from typing import NamedTuple

from shmtransport import CHANNEL_KINDS, ChannelKind

from ..errors import LlamaSplitError
from .geometry import Geometry
from .operations import BY_MODE, Dtype, Mode
from .traffic import forward_sizes

KEY_VARIABLE = "LLAMA_SPLIT_API_KEY"
"""The environment variable of the key that clients of the server must send."""

LEAST_KV_TOKENS = 64
"""The least room that the server's KV cache may have."""

MOST_PIPELINED = 8
"""The most chunks of a prompt in flight at once."""

_MIN_ARENA_BYTES = 16 << 20
ARENA_TOKENS = 1024  # what the default arenas are made for
_ARENA_LOGITS = 16  # rows of a batch in generation, each with one token's logits
_LARGEST_TENSORS_HELD = 4


class NamedDtype(NamedTuple):
    """A dtype as users name it; ``itemsize`` is the bytes of one element."""

    name: str
    itemsize: int


NO_SHIELD = "none"

INTEGERS = "int8"
"""The dtype of a worker for a shield that sends whole numbers."""

DTYPES = {name: NamedDtype(name, nbytes) for name, nbytes in (("float32", 4), ("bfloat16", 2), ("float16", 2))}


def check_dtype(name: str) -> NamedDtype:
    """Return the dtype of this name.

    Raises:
        LlamaSplitError: it is not supported.
    """
    if name not in DTYPES:
        raise unsupported_dtype(name)
    return DTYPES[name]


def unsupported_dtype(dtype: object) -> LlamaSplitError:
    """The error for a dtype that is not one of ``DTYPES``."""
    return LlamaSplitError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")


def parse_mode(mode: str | Mode) -> Mode:
    """Return the split of this name.

    Raises:
        LlamaSplitError: there is no such split.
    """
    try:
        return Mode(mode)
    except ValueError:
        known = ", ".join(mode.value for mode in Mode)
        raise LlamaSplitError(f"mode {mode!r} is not supported; choose one of {known}") from None


def parse_channel(name: str) -> ChannelKind:
    """Return the channel of this name.

    Raises:
        LlamaSplitError: there is no such channel.
    """
    for channel in CHANNEL_KINDS:
        if name == channel:
            return channel
    raise LlamaSplitError(f"channel {name!r} is not supported; choose one of {', '.join(CHANNEL_KINDS)}")


def check_pipeline(chunks: int, mode: Mode, workers: int) -> None:
    """Refuse a number of chunks that a prompt can't be split into, or that this split has no use for.

    Args:
        chunks: as the user chose.
        mode: the split.
        workers: how many workers share the layers.

    Raises:
        LlamaSplitError: it is not between 1 and ``MOST_PIPELINED``, or more than 1 where a single worker attends.
    """
    if not 1 <= chunks <= MOST_PIPELINED:
        raise LlamaSplitError(f"pipeline {chunks} is not supported; choose 1 to {MOST_PIPELINED} chunks")
    if chunks > 1 and mode.worker_keeps_kv and workers == 1:
        raise LlamaSplitError(
            f"pipeline {chunks}: in mode {mode.value} nothing could overlap with the one worker; use fused or op, or "
            "several workers"
        )


def default_arena_bytes(geometry: Geometry, mode: Mode, dtype: Dtype) -> int:
    """The size in bytes of an arena that holds a few of the largest tensors of a 1024-token forward at once.

    Longer prompts may cross in more calls.

    Args:
        geometry: the model's sizes.
        mode: the split, which decides what crosses.
        dtype: the dtype of activations that cross.
    """
    sizes = forward_sizes(geometry, ARENA_TOKENS, logits=_ARENA_LOGITS)
    crossing = [tensor for operation in BY_MODE[mode] for tensor in (*operation.arguments, operation.result)]
    return max(_MIN_ARENA_BYTES, _LARGEST_TENSORS_HELD * max(tensor.nbytes(sizes, dtype) for tensor in crossing))
