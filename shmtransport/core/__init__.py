"""Integers, bytes and addresses: no torch, no sockets, no files.

What a call spends its time in has two twins: one in Python, the executable specification, and one in C. Each provides
all names of ``CONTRACT``, and nothing else differs between them: the same bytes, the same errors.

The compiled twin is the default where there is one. ``SHMTRANSPORT_CORE=native`` or ``=python`` in the environment
chooses one; a choice that can't be had is an ImportError.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .python_twin import (
        Bell,
        Block,
        Borrows,
        CallState,
        Counters,
        DirectAnswers,
        DirectCalls,
        Loans,
        MessageCalls,
        MessageRing,
        NextFitAllocator,
        Patience,
        answer_in_turn,
        decode_call,
        decode_values,
        encode_reply,
        encode_request,
        take_call,
    )

__all__ = [
    "CONTRACT",
    "CORE",
    "CORE_REASON",
    "Bell",
    "Block",
    "Borrows",
    "CallState",
    "Counters",
    "DirectAnswers",
    "DirectCalls",
    "Loans",
    "MessageCalls",
    "MessageRing",
    "NextFitAllocator",
    "Patience",
    "answer_in_turn",
    "decode_call",
    "decode_values",
    "encode_reply",
    "encode_request",
    "take_call",
]

CONTRACT = (
    "Bell",
    "Block",
    "Borrows",
    "CallState",
    "Counters",
    "DirectAnswers",
    "DirectCalls",
    "Loans",
    "MessageCalls",
    "MessageRing",
    "NextFitAllocator",
    "Patience",
    "answer_in_turn",
    "decode_call",
    "decode_values",
    "encode_reply",
    "encode_request",
    "take_call",
)
"""What each twin provides."""

SWITCH = "SHMTRANSPORT_CORE"


def choose(wanted: str) -> tuple[ModuleType, str, str]:
    """A twin, its name, and why it is the one; ``wanted`` is a name, or empty for the default.

    Raises:
        ImportError: there is no such twin, or it can't be loaded.
    """
    if wanted not in ("", "python", "native"):
        raise ImportError(f"{SWITCH}={wanted} names no core: set it to python or native, or unset it")
    if wanted == "python":
        return _python_twin(), "python", f"{SWITCH}=python"
    try:
        return import_module(".native_twin", __name__), "native", f"{SWITCH}=native" if wanted else "it is the default"
    except ImportError as error:
        why = f"the compiled core can't be loaded ({error}): install shmtransport where there is a C compiler"
        if not wanted:
            return _python_twin(), "python", why
        raise ImportError(f"{SWITCH}=native, but {why}, or unset {SWITCH}") from error


def _python_twin() -> ModuleType:
    return import_module(".python_twin", __name__)  # only where it is used, which is not where a command must be quick


_twin, CORE, CORE_REASON = choose(os.environ.get(SWITCH, ""))
globals().update({name: getattr(_twin, name) for name in CONTRACT})
