"""The core in Python: the executable specification, and what a machine without a compiler uses."""

from typing import Any

from .allocator import Block, NextFitAllocator
from .bell import Bell
from .borrows import Borrows
from .calls import CallState
from .codec import decode_call, decode_values, encode_reply, encode_request, take_call
from .counters import Counters
from .loans import Loans
from .message_ring import MessageRing
from .patience import Patience

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

# What the compiled twin does in one step where nothing stands in the way; here ``protocol`` and ``endpoints`` do it.
MessageCalls: Any = None
DirectCalls: Any = None
DirectAnswers: Any = None
answer_in_turn: Any = None
