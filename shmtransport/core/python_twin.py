"""The core in Python: the executable specification, and what a machine without a compiler uses."""

from .allocator import Block, NextFitAllocator
from .borrows import Borrows
from .codec import decode_call, decode_values, encode_reply, encode_request, take_call
from .counters import Counters
from .loans import Loans
from .message_ring import MessageRing

__all__ = [
    "Block",
    "Borrows",
    "Counters",
    "Loans",
    "MessageRing",
    "NextFitAllocator",
    "decode_call",
    "decode_values",
    "encode_reply",
    "encode_request",
    "take_call",
]
