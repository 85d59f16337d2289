"""Messages: what goes in comes out, limits are the sender's error, and a peer's bytes raise nothing but its own."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmtransport.core.layout import FORMAT_VERSION
from shmtransport.errors import MessageTooLarge, PeerProtocolError
from shmtransport.protocol.messages import (
    MAGIC_BYTE,
    MAX_TENSORS,
    PREAMBLE,
    Failure,
    Goodbye,
    Message,
    Refused,
    Reply,
    Request,
    decode,
    encode,
    shorten,
)
from shmtransport.protocol.values import pack, unpack
from tests.support.messages import DESCRIPTOR, MESSAGES

# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_round_trips(message: Message) -> None:
    """A decoded message is equal to the encoded one and of the same type."""
    received = decode(encode(message))
    assert type(received) is type(message)
    assert received == message


def test_a_message_starts_with_magic_and_version() -> None:
    """Two bytes before anything else tell protocol and version."""
    assert all(encode(message)[:2] == bytes((MAGIC_BYTE, FORMAT_VERSION)) for message in MESSAGES)


@pytest.mark.parametrize("size", [10, 99, 100])
def test_a_message_beyond_the_limit_is_refused_with_figures(size: int) -> None:
    """The error names the message's size, the limit and the remedy; exactly the limit is allowed."""
    message = Goodbye("x" * size)
    length = len(encode(message))
    assert len(encode(message, length)) == length
    with pytest.raises(MessageTooLarge, match=f"take {length} bytes; the limit is {length - 1}.*max_message_bytes"):
        encode(message, length - 1)


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (10, 10), (11, 10), (1000, 10)])
def test_shorten_cuts_to_the_limit(length: int, expected: int) -> None:
    """A shortened text has at most the limit's characters and shows that it was cut."""
    text = shorten("a" * length, 10)
    assert len(text) == expected
    assert text.endswith("…") == (length > 10)


def test_the_longest_shortened_text_can_be_received() -> None:
    """A failure whose text was cut to the limit decodes, whatever its characters' size in bytes."""
    failure = Failure(1, "handler", shorten("T" * 999, 256), shorten("😀" * 9999))
    assert decode(encode(failure)) == failure


# --- what a peer may send ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", bytes((MAGIC_BYTE,)), b"\0\1" + encode(Goodbye(""))[2:], b"GET / HTTP/1.1", PREAMBLE, PREAMBLE + b"\xc1"],
    ids=repr,
)
def test_bytes_that_are_no_message_are_the_peers_error(data: bytes) -> None:
    """Empty, cut, foreign."""
    with pytest.raises(PeerProtocolError):
        decode(data)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [99],
        ["5", ""],
        [5],
        [5, "", ""],
        [5, 1],
        [5, "x" * 4097],
        [2, -1],
        [2, 2**63],
        [2, 1.0],
        [3, "x" * 257],
        [6, 0, "m", [], {1: 2}, []],
        [6, 0, "m", {}, {}, []],
        [6, 0, "m", [], {}, [[0, [1] * 17, "int8", 0, 1]]],
        [7, 0, None, [[0, [1], "int8", 0, 1]] * (MAX_TENSORS + 1)],
        {"type": 5, "reason": ""},
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_fields_of_wrong_type_count_or_size_are_the_peers_error(fields: Any) -> None:
    """Each field has a type and a limit, and there are exactly as many as the message has."""
    with pytest.raises(PeerProtocolError):
        decode(PREAMBLE + msgspec.msgpack.encode(fields))


def test_bytes_after_a_message_are_the_peers_error() -> None:
    """One message is one message."""
    with pytest.raises(PeerProtocolError):
        decode(encode(Goodbye("x")) + b"\xc0")


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, 255])
def test_a_refusal_of_another_version_can_be_read(version: int) -> None:
    """Two versions can always tell each other that they don't match; anything else names both versions."""
    data = bytearray(encode(Refused("this server speaks another version")))
    data[1] = version
    assert decode(bytes(data)) == Refused("this server speaks another version")
    for message in MESSAGES:
        if isinstance(message, Refused):
            continue
        other = bytearray(encode(message))
        other[1] = version
        with pytest.raises(PeerProtocolError, match=f"version {version}, this side {FORMAT_VERSION}.*install the same"):
            decode(bytes(other))


def test_a_refusal_of_another_version_with_bad_text_is_the_peers_error() -> None:
    """Bytes of another version are as untrusted as one's own."""
    with pytest.raises(PeerProtocolError):
        decode(bytes((MAGIC_BYTE, FORMAT_VERSION + 1)) + b"\x92\x01\xa1\xff")


def _receive(data: bytes) -> None:
    """All that a receiver does with a peer's bytes."""
    try:
        message = decode(data)
        if isinstance(message, Request):
            unpack([message.arguments, message.keywords], [torch.ones(1)])
        elif isinstance(message, Reply):
            unpack(message.result, [torch.ones(1)])
    except PeerProtocolError:
        return
    assert isinstance(message, Message)


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", PREAMBLE, PREAMBLE + b"\x96\x06\x00\xa1m", PREAMBLE + b"\x94\x07\x00"]),
)
@settings(max_examples=400)
def test_random_bytes_raise_only_the_peers_error(data: bytes, head: bytes) -> None:
    """Whatever bytes come in, nothing but PeerProtocolError goes out."""
    _receive(head + data)


_valid = [encode(message) for message in MESSAGES] + [
    encode(
        Request(
            3,
            "m",
            pack([torch.ones(1), (1, 2.5, "text", b"bytes"), {"k": [None, {7: True}]}, np.ones(1)], lambda _tensor: 0),
            {"keyword": pack((torch.ones(1),), lambda _tensor: 0)},
            (DESCRIPTOR,),
        )
    )
]


@given(st.sampled_from(_valid), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=500)
def test_mutated_messages_raise_only_the_peers_error(valid: bytes, changes: list[tuple[int, int]]) -> None:
    """A valid message with a few bytes of its body changed decodes to some message or is the peer's error."""
    data = bytearray(valid)
    for index, byte in changes:
        data[len(PREAMBLE) + index % (len(data) - len(PREAMBLE))] = byte
    _receive(bytes(data))


@pytest.mark.parametrize("valid", _valid, ids=range(len(_valid)))
def test_truncated_messages_are_the_peers_error(valid: bytes) -> None:
    """No proper beginning of a message is a message."""
    for length in range(len(valid)):
        with pytest.raises(PeerProtocolError):
            decode(valid[:length])


@given(st.binary(max_size=16), st.integers(-128, 127))
@settings(max_examples=200)
def test_random_extensions_raise_only_the_peers_error(data: bytes, code: int) -> None:
    """Extensions, timestamps among them, of any code and content: the peer's error or one of the tensors."""
    header = bytes((0xC7, len(data), code & 0xFF))
    _receive(PREAMBLE + b"\x94\x07\x00" + header + data + b"\x90")
    _receive(PREAMBLE + b"\x94\x07\x00\x81" + header + data + b"\x01\x90")
