"""What either twin of the core raises, in words: each function returns one error.

C has no words of its own: it calls these by name, with the figures.
"""

from __future__ import annotations

from ..errors import LocalProtocolError, MessageTooLarge, PeerProtocolError
from .layout import BLOCK_ALIGNMENT


def bad_capacity(capacity: int) -> ValueError:
    """An allocator can't have this capacity."""
    return ValueError(f"capacity {capacity} is not a positive multiple of {BLOCK_ALIGNMENT}")


def empty_claim(nbytes: int) -> ValueError:
    """A claim of nothing."""
    return ValueError(f"a block needs at least one byte, not {nbytes}")


def block_not_held(offset: int) -> ValueError:
    """A release of what is released already, or was claimed elsewhere."""
    return ValueError(f"the block at offset {offset} is not held")


def file_too_small(nbytes: int, needed: int) -> ValueError:
    """A file that is smaller than what is to be mapped of it."""
    return ValueError(f"a file of {nbytes} bytes can't be mapped for {needed}")


def outside_of_mapping(start: int, length: int) -> ValueError:
    """A place that is not in a mapping."""
    return ValueError(f"{start} and {length} are not all inside of the mapping, and aligned")


def bad_ring_memory(nbytes: int) -> ValueError:
    """This memory can't be a message ring's."""
    return ValueError(
        f"{nbytes} bytes can't be a message ring: its cells and records take aligned multiples of 8 bytes"
    )


def message_too_large(length: int, largest: int) -> MessageTooLarge:
    """A message that could never pass a message ring."""
    return MessageTooLarge(
        f"a message of {length} bytes can't pass a message ring that takes {largest}: "
        "send large data as tensors, or raise max_message_bytes on both sides"
    )


def bad_published(published: int, consumed: int, capacity: int) -> PeerProtocolError:
    """The peer's ring can't hold what it says that it holds."""
    return PeerProtocolError(
        f"the peer has published {published - consumed} bytes beyond what was read; its message ring takes {capacity}"
    )


def bad_record(length: int, unread: int) -> PeerProtocolError:
    """A record that reaches beyond what was published."""
    return PeerProtocolError(f"the peer's message ring names a record of {length} bytes; {unread} are there")


def bad_length(length: int, largest: int) -> PeerProtocolError:
    """A record that is larger than a message may be."""
    return PeerProtocolError(f"the peer sent a message of {length} bytes; {largest} were agreed")


def bad_consumed(consumed: int, least: int, most: int) -> PeerProtocolError:
    """The peer can't have read that much, or that little."""
    return PeerProtocolError(
        f"the peer says that it has read {consumed} bytes of messages; between {least} and {most} are possible"
    )


def beyond_64_bits() -> OverflowError:
    """An integer that MessagePack has no room for."""
    return OverflowError("Integer value out of range")


def beyond_32_bits(count: int) -> OverflowError:
    """More bytes or items than MessagePack can count."""
    return OverflowError(f"{count} bytes or items are beyond 32 bits")


def nested_too_deep(limit: int) -> LocalProtocolError:
    """A value that is nested deeper than any peer would accept."""
    return LocalProtocolError(f"arguments and results may be nested {limit} deep at most")


def bad_key(kind: type[object]) -> LocalProtocolError:
    """A dict with a key that can't be sent."""
    return LocalProtocolError(f"dict keys must be str or int, not {kind.__name__}")


def changed_size() -> RuntimeError:
    """A dict that another thread, or the packing of an item, has changed."""
    return RuntimeError("a dict changed its size or its keys while it was being encoded")


def invalid_values() -> PeerProtocolError:
    """Bytes that are not the values of a message that was checked before."""
    return PeerProtocolError("the peer sent values that are invalid")


def cut_short() -> PeerProtocolError:
    """Zeros were read in place of what the peer has cut off its segment."""
    return PeerProtocolError("the peer has cut its segment short")


def subinterpreter() -> ImportError:
    """The compiled core was imported where it can't work."""
    return ImportError("the compiled core works in the main interpreter only, not in a subinterpreter")
