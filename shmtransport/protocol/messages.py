"""The control messages and their bytes. Nothing here touches memory that a peer can write.

Every message starts with two bytes: a magic byte and the format version. ``Refused`` is the same in every version, so
two versions can always tell each other that they don't match.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ..channel_kinds import CHANNEL_KINDS as CHANNEL_KINDS
from ..channel_kinds import ChannelKind as ChannelKind
from ..core.codec import FAILURE_TAG, MAGIC_BYTE, PREAMBLE, REPLY_TAG, REQUEST_TAG
from ..core.layout import FORMAT_VERSION
from ..errors import LocalProtocolError, MessageTooLarge, PeerProtocolError
from ..memory.descriptor import TensorDescriptor
from ..text import printable

DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024
MIN_MESSAGE_BYTES = 1024  # holds every message of the handshake, and a failure with some text
MAX_TENSORS = 1024
MAX_NAME_CHARACTERS = 256
MAX_WINDOW = 1024
"""The most parts of one stream that may be on their way to a client."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_ShortText = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARACTERS)]
_LongText = Annotated[str, msgspec.Meta(max_length=4096)]
_Descriptors = Annotated[tuple[TensorDescriptor, ...], msgspec.Meta(max_length=MAX_TENSORS)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The base of all control messages: an array whose first item is the message's tag."""


class Hello(Message, frozen=True, array_like=True, tag=0):
    """The client's first message: what it asks for.

    Sizes are in bytes; ``channel`` will carry requests and replies.
    """

    request_arena_bytes: _Count
    reply_arena_bytes: _Count
    max_message_bytes: _Count
    channel: ChannelKind = "zmq"


class Refused(Message, frozen=True, array_like=True, tag=1):
    """The server's refusal and its reason, at any point of the handshake."""

    reason: _LongText


class Offer(Message, frozen=True, array_like=True, tag=2):
    """The server's answer to Hello: it grants the sizes. Neither side has allocated anything yet."""

    max_message_bytes: _Count


class Attach(Message, frozen=True, array_like=True, tag=3):
    """The client's answer to Offer: the name of its segment."""

    segment: _ShortText


class Welcome(Message, frozen=True, array_like=True, tag=4):
    """The server's last message: the name of its segment. It has mapped the client's."""

    segment: _ShortText


class Goodbye(Message, frozen=True, array_like=True, tag=5):
    """Either side's last message: the connection is over."""

    reason: _LongText


class Request(Message, frozen=True, array_like=True, tag=REQUEST_TAG):
    """One call."""

    call_id: _Count
    method: _ShortText
    arguments: list[Any]
    keywords: dict[str, Any]
    tensors: _Descriptors


class Reply(Message, frozen=True, array_like=True, tag=REPLY_TAG):
    """A call's result."""

    call_id: _Count
    result: Any
    tensors: _Descriptors


class Failure(Message, frozen=True, array_like=True, tag=FAILURE_TAG):
    """A call's exception: its class name and text.

    ``error_name`` is "handler", or the name of one of this package's errors. ``traceback`` is empty unless the server
    is in debug mode.
    """

    call_id: _Count
    error_name: _ShortText
    type_name: _ShortText
    text: _LongText
    traceback: _LongText = ""


class OneWayRequest(Message, frozen=True, array_like=True, tag=9):
    """One call that is not answered."""

    call_id: _Count
    method: _ShortText
    arguments: list[Any]
    keywords: dict[str, Any]
    tensors: _Descriptors


class StreamRequest(Message, frozen=True, array_like=True, tag=10):
    """One call that is answered by any number of parts, and a Reply or Failure after the last of them.

    ``window`` is how many parts the server may send before it gets ``More``.
    """

    call_id: _Count
    method: _ShortText
    arguments: list[Any]
    keywords: dict[str, Any]
    tensors: _Descriptors
    window: Annotated[int, msgspec.Meta(ge=1, le=MAX_WINDOW)]


class Part(Message, frozen=True, array_like=True, tag=11):
    """One of the results of a streaming call."""

    call_id: _Count
    result: Any
    tensors: _Descriptors


class More(Message, frozen=True, array_like=True, tag=12):
    """The client has taken this many parts of a stream, so the server may send as many more."""

    call_id: _Count
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_WINDOW)]


class Cancel(Message, frozen=True, array_like=True, tag=13):
    """The client no longer waits for this call. The server need not answer it, and ends its stream."""

    call_id: _Count


AnyRequest = Request | OneWayRequest | StreamRequest
AnyMessage = Hello | Refused | Offer | Attach | Welcome | Goodbye | AnyRequest | Reply | Failure | Part | More | Cancel
_REPLY_TAGS = frozenset(kind.__struct_config__.tag for kind in (Reply, Failure, Part))
_REASON_CHARACTERS = 200

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)
_refused_decoder = msgspec.msgpack.Decoder(Refused)


def encode(message: Message, max_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> bytes:
    """Return the bytes of a message.

    Raises:
        MessageTooLarge: they are more than ``max_bytes``.
        LocalProtocolError: an integer is beyond 64 bits, or a text holds a lone surrogate.
    """
    try:
        data = PREAMBLE + _encoder.encode(message)
    except UNSENDABLE as error:
        raise unsendable(error) from error
    check_size(data, max_bytes)
    return data


UNSENDABLE = (OverflowError, UnicodeEncodeError)
"""What encoding raises for an integer beyond 64 bits, or a text with a lone surrogate."""


def unsendable(error: Exception) -> LocalProtocolError:
    """Return what the sender is told of such a value."""
    return LocalProtocolError(f"a plain value can't be sent: {error}")


def check_size(data: bytes, max_bytes: int) -> None:
    """Check a message's size.

    Raises:
        MessageTooLarge: it has more than ``max_bytes`` bytes.
    """
    if len(data) > max_bytes:
        raise MessageTooLarge(
            f"the plain values of this message take {len(data)} bytes; the limit is {max_bytes}: "
            "send large data as tensors, or raise max_message_bytes on both sides"
        )


def is_reply(data: bytes) -> bool:
    """Return whether this side's message answers a call, so that its receiver is a client."""
    return data[len(PREAMBLE) + 1] in _REPLY_TAGS


def decode(data: bytes) -> AnyMessage:
    """Return the typed message in a peer's bytes.

    Raises:
        PeerProtocolError: the bytes are of another format version, or no valid message.
    """
    if not data.startswith(PREAMBLE):
        return _decode_other_version(data)
    try:
        message: AnyMessage = _decoder.decode(data[2:])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PeerProtocolError(f"the peer sent an invalid message: {_reason(error)}") from None
    return message


def _decode_other_version(data: bytes) -> Refused:
    """Return a peer's Refused of another format version; all else of such a peer is an error."""
    if len(data) < len(PREAMBLE) or data[0] != MAGIC_BYTE:
        raise PeerProtocolError("the peer's bytes are no message of this protocol")
    try:
        return _refused_decoder.decode(memoryview(data)[len(PREAMBLE) :])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise PeerProtocolError(
            f"the peer speaks format version {data[1]}, this side {FORMAT_VERSION}: "
            "install the same shmtransport on both sides"
        ) from None


def _reason(error: Exception) -> str:
    """Return a decoder's text, cut and made printable, since it may quote the peer's bytes."""
    return printable(str(error)[:_REASON_CHARACTERS])


def shorten(text: str, limit: int = 4096) -> str:
    """Cut a text to ``limit`` characters, by default as many as a message's text field takes."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
