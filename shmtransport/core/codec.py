"""The bytes of requests and replies: MessagePack, after two bytes that name the protocol and its version.

Values of the plain types, and lists, tuples and dicts of them, are this module's; what a tensor becomes is the
caller's: it gives a function ``pack(value, depth)``, which returns a value in plain types, lists, dicts and ``Ext``. A
tuple travels as a list that starts with a marker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .layout import FORMAT_VERSION
from .refusals import invalid_values

MAGIC_BYTE = 0xD5
PREAMBLE = bytes((MAGIC_BYTE, FORMAT_VERSION))
REQUEST_TAG, REPLY_TAG, FAILURE_TAG = 6, 7, 8
MAX_DEPTH = 32
ARGUMENT_DEPTH = 2  # an argument is an item of the list of arguments, which is an item of the message
EXT_TENSOR, EXT_ARRAY, EXT_TUPLE = 1, 2, 3

Pack = Callable[[Any, int], Any]

_encode = msgspec.msgpack.Encoder().encode


def encode_request(
    call_id: int,
    method: str,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    pack: Pack,
    descriptors: list[Any],
    loans: Any,
) -> tuple[bytes, int, int, int]:
    """Return the bytes of a request, and what this twin has exported of its tensors by itself.

    That is: the size of these tensors in bytes, how many of them were copied in, and the size of those. The compiled
    twin exports plain tensors by its own ``loans``; this one leaves all of them to ``pack``.

    Args:
        call_id: names the call in its reply.
        method: the name of the handler.
        arguments: the positional arguments.
        keywords: the keyword arguments.
        pack: returns a value at a depth in what can be encoded; exports its tensors, in order.
        descriptors: the exported tensors, after everything was packed.
        loans: what tensors are exported by.

    Raises:
        OverflowError: an integer is beyond 64 bits.
        UnicodeEncodeError: a text holds a lone surrogate.
        LocalProtocolError: a dict's key can't be sent, or values are nested deeper than ``MAX_DEPTH``.
    """
    packed = [pack(argument, ARGUMENT_DEPTH) for argument in arguments]
    named = {name: pack(argument, ARGUMENT_DEPTH) for name, argument in keywords.items()}
    return PREAMBLE + _encode([REQUEST_TAG, call_id, method, packed, named, descriptors]), 0, 0, 0


def encode_reply(
    call_id: int, result: Any, pack: Pack, descriptors: list[Any], loans: Any
) -> tuple[bytes, int, int, int]:
    """Return the bytes of a reply, and what was exported; see ``encode_request``."""
    return PREAMBLE + _encode([REPLY_TAG, call_id, pack(result, 0), descriptors]), 0, 0, 0


def take_call(data: bytes, tag: int, borrows: Any) -> tuple[Any, ...] | None:
    """Read a received request or reply as a whole, with its tensors borrowed, if this twin does so.

    The compiled twin does so for a valid message of that tag whose tensors its own ``borrows`` can all borrow, and, if
    any is to become an array, can all make arrays of. It leaves every other message to ``decode_call``, with nothing
    borrowed.

    This twin leaves every message to that.

    Returns:
        For a request: the call's id, the method, the arguments, a tuple, and the keyword arguments, both in one tuple,
        how many tensors there are, and their size in bytes. For a reply: the call's id, the result, how many tensors
        there are, and their size. None for what is left.
    """
    return None


def decode_call(data: bytes, describe: Callable[..., Any]) -> tuple[int, str | None, tuple[Any, ...], int] | None:
    """Look at a received request or reply without its values, if this twin does so.

    The compiled twin returns the call's id, a request's method or None for a reply, the descriptors that
    ``describe(offset, shape, dtype, slot, sequence)`` makes, and where the values begin, for ``decode_values``. It
    returns None for a message of another kind, and for one that is invalid.

    This twin always returns None: it leaves every message to the caller's own decoder, which is the specification of
    what is valid.
    """
    return None


def decode_values(tag: int, data: bytes, start: int, tensors: tuple[Any, ...], to_array: Callable[[Any], Any]) -> Any:
    """Return a reply's result, or a request's arguments and keyword arguments.

    Args:
        tag: the message's kind.
        data: the message.
        start: where its values begin, as ``decode_call`` says.
        tensors: its tensors.
        to_array: makes an array of a tensor that was sent as one.

    Raises:
        PeerProtocolError: there are no such values.
    """
    raise invalid_values()
