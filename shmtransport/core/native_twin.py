"""The core in C, as the Python twin's names: what C needs to be told in Python is done here, once for each object.

Importing it fails where there is no compiled core, or one of another version of this package.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from ._native import FORMAT_VERSION as COMPILED_FORMAT_VERSION
from ._native import (
    Bell,
    Block,
    CallState,
    Counters,
    DirectAnswers,
    DirectCalls,
    MessageCalls,
    NextFitAllocator,
    Patience,
    answer_in_turn,
    decode_call,
    decode_values,
    encode_reply,
    encode_request,
    take_call,
)
from ._native import Borrows as CompiledBorrows
from ._native import Loans as CompiledLoans
from ._native import MessageRing as CompiledMessageRing
from ._native import Tensors as CompiledTensors
from .layout import FORMAT_VERSION
from .refusals import bad_ring_memory
from .tensors import Arrays, Tensors, address_of_memory

__all__ = [
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

if COMPILED_FORMAT_VERSION != FORMAT_VERSION:
    raise ImportError(
        f"the compiled core has format version {COMPILED_FORMAT_VERSION}, this package {FORMAT_VERSION}: build it again"
    )


def _address(memory: memoryview) -> tuple[int, ctypes.c_char]:
    """Where a writable memory begins, and what keeps it where it is."""
    if not memory.nbytes:
        raise bad_ring_memory(0)
    first = ctypes.c_char.from_buffer(memory)
    return ctypes.addressof(first), first


class MessageRing(CompiledMessageRing):
    """As the Python twin's."""

    __slots__ = ()

    def __new__(cls, own: memoryview, peer: memoryview) -> MessageRing:
        own_address, own_anchor = _address(own)
        peer_address, peer_anchor = _address(peer)
        return super().__new__(cls, own_address, own.nbytes, own_anchor, peer_address, peer.nbytes, peer_anchor)


@functools.cache
def _compiled(kind: type, rows: tuple[Any, ...], arrays: Arrays | None) -> CompiledTensors:
    return CompiledTensors(kind, rows, arrays)


def knows(tensors: Tensors) -> bool:
    """Whether this twin can make these tensors: their library must have an exchange table of DLPack 1.3 or later."""
    try:
        _compiled(tensors.type, tensors.rows, tensors.arrays)
    except (AttributeError, ImportError):
        return False
    return True


def _place(memory: memoryview) -> tuple[Any, int, int]:
    """The mapping that a memory is part of, where in it that begins, and how many items it has."""
    mapping = memory.obj.mapping  # type: ignore[attr-defined]  # see memory/mapped_file
    return mapping, address_of_memory(memory) - mapping.address, len(memory)


class Loans(CompiledLoans):
    """As the Python twin's."""

    __slots__ = ()

    def __new__(cls, data: memoryview, released: memoryview, tensors: Tensors) -> Loans:
        library = _compiled(tensors.type, tensors.rows, tensors.arrays)
        return super().__new__(cls, *_place(data), *_place(released), library, tensors.describe)


class Borrows(CompiledBorrows):
    """As the Python twin's."""

    __slots__ = ()

    def __new__(cls, data: memoryview, released: memoryview, tensors: Tensors) -> Borrows:
        return super().__new__(
            cls, *_place(data), *_place(released), _compiled(tensors.type, tensors.rows, tensors.arrays)
        )
