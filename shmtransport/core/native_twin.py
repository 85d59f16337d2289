"""The core in C, as the Python twin's names: what C needs to be told in Python is done here, once for each object.

Importing it fails where there is no compiled core, or one of another version of this package.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from ._native import FORMAT_VERSION as COMPILED_FORMAT_VERSION
from ._native import Block, NextFitAllocator, decode_call, decode_values, encode_reply, encode_request
from ._native import MessageRing as CompiledMessageRing
from .layout import FORMAT_VERSION
from .refusals import bad_ring_memory

__all__ = ["Block", "MessageRing", "NextFitAllocator", "decode_call", "decode_values", "encode_reply", "encode_request"]

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

    def __new__(cls, own: memoryview, peer: memoryview, on_room: Callable[[], None] = lambda: None) -> MessageRing:
        own_address, own_anchor = _address(own)
        peer_address, peer_anchor = _address(peer)
        return super().__new__(
            cls, own_address, own.nbytes, own_anchor, peer_address, peer.nbytes, peer_anchor, on_room
        )
