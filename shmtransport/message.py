"""The control messages and their bytes; nothing here touches memory that a peer can write.

Every message starts with two bytes: a magic byte and the format version. ``Refused`` never changes, so that two
versions can always tell each other that they don't match.

Plain values (None, bool, int, float, str, bytes, and lists, tuples and dicts of them) travel as MessagePack. A tensor
travels as an extension that holds its index in the message's descriptor list; a tuple as a list that starts with a
marker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
import numpy as np
import torch
import torch.utils.dlpack
from msgspec.msgpack import Ext

from .descriptor import TensorDescriptor
from .errors import LocalProtocolError, MessageTooLarge, PeerProtocolError
from .layout import FORMAT_VERSION
from .plain import of_a_library
from .text import printable

MAGIC_BYTE = 0xD5
PREAMBLE = bytes((MAGIC_BYTE, FORMAT_VERSION))
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024
MIN_MESSAGE_BYTES = 1024  # holds every message of the handshake, and a failure with some text
MAX_TENSORS = 1024
MAX_DEPTH = 32
MAX_NAME_CHARACTERS = 256

_EXT_TENSOR = 1
_EXT_ARRAY = 2
_EXT_TUPLE = 3
_TUPLE_MARKER = Ext(_EXT_TUPLE, b"")
_INDEX = {index.to_bytes(2, "little"): index for index in range(MAX_TENSORS)}
_TENSOR_EXTS = tuple(Ext(_EXT_TENSOR, data) for data in _INDEX)

ChannelKind = Literal["zmq", "doorbell"]
CHANNEL_KINDS: tuple[ChannelKind, ...] = get_args(ChannelKind)
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_ShortText = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARACTERS)]
_LongText = Annotated[str, msgspec.Meta(max_length=4096)]
_Descriptors = Annotated[tuple[TensorDescriptor, ...], msgspec.Meta(max_length=MAX_TENSORS)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all control messages: an array whose first item is the message's tag."""


class Hello(Message, frozen=True, array_like=True, tag=0):
    """Client, first: what it wants. Sizes in bytes; ``channel`` is what will carry requests and replies."""

    request_arena_bytes: _Count
    reply_arena_bytes: _Count
    max_message_bytes: _Count
    channel: ChannelKind = "zmq"


class Refused(Message, frozen=True, array_like=True, tag=1):
    """Server, at any point of the handshake: no, and why."""

    reason: _LongText


class Offer(Message, frozen=True, array_like=True, tag=2):
    """Server, second: the sizes are granted; neither side has allocated anything yet."""

    max_message_bytes: _Count


class Attach(Message, frozen=True, array_like=True, tag=3):
    """Client, third: the segment that it has made and, for the doorbell channel, the name of its bell."""

    segment: _ShortText
    bell: _ShortText = ""


class Welcome(Message, frozen=True, array_like=True, tag=4):
    """Server, last: the segment that it has made and its bell, if asked for; it has mapped the client's."""

    segment: _ShortText
    bell: _ShortText = ""


class Goodbye(Message, frozen=True, array_like=True, tag=5):
    """Either side: this connection is over."""

    reason: _LongText


class Request(Message, frozen=True, array_like=True, tag=6):
    """One call."""

    call_id: _Count
    method: _ShortText
    arguments: list[Any]
    keywords: dict[str, Any]
    tensors: _Descriptors


class Reply(Message, frozen=True, array_like=True, tag=7):
    """A call's result."""

    call_id: _Count
    result: Any
    tensors: _Descriptors


class Failure(Message, frozen=True, array_like=True, tag=8):
    """A call's exception: class name and text. ``kind`` is "handler" or the name of one of this package's errors."""

    call_id: _Count
    kind: _ShortText
    type_name: _ShortText
    text: _LongText


AnyMessage = Hello | Refused | Offer | Attach | Welcome | Goodbye | Request | Reply | Failure
_PLAIN_TYPES = frozenset({type(None), bool, int, float, str, bytes})
_KEY_TYPES = frozenset({str, int})
_REPLY_TAGS = frozenset(kind.__struct_config__.tag for kind in (Reply, Failure))
_REASON_CHARACTERS = 200

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)
_refused_decoder = msgspec.msgpack.Decoder(Refused)


def encode(message: Message, max_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> bytes:
    """The bytes of a message.

    Raises:
        MessageTooLarge: it exceeds ``max_bytes``.
        LocalProtocolError: an integer is beyond 64 bits.
    """
    try:
        data = PREAMBLE + _encoder.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise LocalProtocolError(f"a plain value can't be sent: {error}") from error
    if len(data) > max_bytes:
        raise MessageTooLarge(
            f"the plain values of this message take {len(data)} bytes; the limit is {max_bytes}: "
            "send large data as tensors, or raise max_message_bytes on both sides"
        )
    return data


def is_reply(data: bytes) -> bool:
    """Whether the bytes of a message of our own are a call's answer: what only a connected client is sent."""
    return data[len(PREAMBLE) + 1] in _REPLY_TAGS


def decode(data: bytes) -> AnyMessage:
    """The typed message in a peer's bytes.

    Raises:
        PeerProtocolError: another format version, or bytes that are no valid message.
    """
    if not data.startswith(PREAMBLE):
        return _decode_other_version(data)
    try:
        message: AnyMessage = _decoder.decode(data[2:])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PeerProtocolError(f"the peer sent an invalid message: {_reason(error)}") from None
    return message


def _decode_other_version(data: bytes) -> Refused:
    """What another version says to this one: that it refuses, or nothing that can be understood."""
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
    """A decoder's words, cut: they may repeat the peer's."""
    return printable(str(error)[:_REASON_CHARACTERS])


def shorten(text: str, limit: int = 4096) -> str:
    """Cut a text to what a message's text field takes."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def pack(value: Any, export: Callable[[torch.Tensor | np.ndarray[Any, Any]], int], depth: int = 0) -> Any:
    """A value ready to encode; every tensor in it goes through ``export``, which returns its descriptor's index.

    Raises:
        LocalProtocolError: a value of a type that can't be sent, or nesting beyond ``MAX_DEPTH``.
    """
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if isinstance(value, torch.Tensor):
        return _TENSOR_EXTS[export(value)]
    if isinstance(value, np.ndarray):
        index = export(value)
        # What numpy itself doesn't have, a dtype of ml_dtypes say, arrives as a tensor.
        return _TENSOR_EXTS[index] if of_a_library(value) else Ext(_EXT_ARRAY, index.to_bytes(2, "little"))
    if depth >= MAX_DEPTH:
        raise LocalProtocolError(f"arguments and results may be nested {MAX_DEPTH} deep at most")
    if isinstance(value, (list, tuple)):
        items = [pack(item, export, depth + 1) for item in value]
        return [_TUPLE_MARKER, *items] if isinstance(value, tuple) else items
    if isinstance(value, dict):
        for key in value:
            if type(key) not in _KEY_TYPES:
                raise LocalProtocolError(f"dict keys must be str or int, not {type(key).__name__}")
        return {key: pack(item, export, depth + 1) for key, item in value.items()}
    return _pack_foreign(value, export)


def _pack_foreign(value: Any, export: Callable[[torch.Tensor | np.ndarray[Any, Any]], int]) -> Any:
    """A value of another library's type: a numpy scalar, or an array that torch can look into."""
    kind = type(value)
    if isinstance(value, np.generic) and value.dtype.kind not in "mM" and type(value.item()) in _PLAIN_TYPES:
        return value.item()
    if hasattr(kind, "__dlpack__"):
        return _TENSOR_EXTS[export(_from_dlpack(value))]
    raise LocalProtocolError(
        f"an object of type {kind.__name__} can't be sent; tensors, numpy arrays, whatever has __dlpack__, None, bool, "
        "int, float, str, bytes, and lists, tuples and dicts of these can"
    )


def _from_dlpack(value: Any) -> torch.Tensor:
    try:
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
        return tensor
    except Exception as error:  # another library's code: it may raise anything
        raise LocalProtocolError(f"a {type(value).__name__} can't be sent: its __dlpack__ failed: {error}") from error


def unpack(value: Any, tensors: Sequence[torch.Tensor], depth: int = 0) -> Any:
    """The inverse of ``pack``: a peer's decoded value with the borrowed tensors put in.

    Raises:
        PeerProtocolError: an extension, index, type or depth that ``pack`` never makes.
    """
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if depth > MAX_DEPTH:
        raise PeerProtocolError(f"the peer sent values nested more than {MAX_DEPTH} deep")
    if kind is Ext:
        return _unpack_tensor(value, tensors)
    if kind is list:
        if value and type(value[0]) is Ext and value[0].code == _EXT_TUPLE:
            return tuple([unpack(item, tensors, depth + 1) for item in value[1:]])
        return [unpack(item, tensors, depth + 1) for item in value]
    if kind is dict:
        if not all(type(key) in _KEY_TYPES for key in value):
            raise PeerProtocolError("the peer sent a dict key that is neither str nor int")
        return {key: unpack(item, tensors, depth + 1) for key, item in value.items()}
    raise PeerProtocolError(f"the peer sent a value of type {kind.__name__}")


def _unpack_tensor(extension: Ext, tensors: Sequence[torch.Tensor]) -> Any:
    code = extension.code
    index = _INDEX.get(extension.data, MAX_TENSORS)  # type: ignore[call-overload]  # bytes, where it was decoded
    if (code != _EXT_TENSOR and code != _EXT_ARRAY) or index >= len(tensors):
        raise PeerProtocolError(f"the peer sent an extension of code {code} that names no tensor")
    tensor = tensors[index]
    if code == _EXT_TENSOR:
        return tensor
    try:
        array = tensor.numpy()
    except TypeError:
        raise PeerProtocolError(f"the peer sent a numpy array of {tensor.dtype}, which numpy doesn't have") from None
    array.flags.writeable = False
    return array
