"""Messages: what goes in comes out, limits are the sender's error, and a peer's bytes raise nothing but its own."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from shmtransport.descriptor import TensorDescriptor
from shmtransport.errors import LocalProtocolError, MessageTooLarge, PeerProtocolError
from shmtransport.layout import FORMAT_VERSION
from shmtransport.message import (
    MAGIC_BYTE,
    MAX_DEPTH,
    MAX_TENSORS,
    PREAMBLE,
    Attach,
    Failure,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refused,
    Reply,
    Request,
    Welcome,
    decode,
    encode,
    pack,
    shorten,
    unpack,
)

DESCRIPTOR = TensorDescriptor(64, (2, 3), "float32", 5, 9)
MESSAGES: list[Message] = [
    Hello(1 << 30, 0, 65536),
    Refused("too many clients"),
    Offer(65536),
    Attach("/shmtransport-" + "0" * 32),
    Welcome("/shmtransport-" + "f" * 32),
    Goodbye(""),
    Request(0, "linear", [1, "a", None], {"layer": 3}, (DESCRIPTOR,)),
    Reply(2**63 - 1, [True, 1.5, b"x"], (DESCRIPTOR, DESCRIPTOR)),
    Failure(7, "handler", "ValueError", "no such layer: é"),
]


def _no_tensors(_tensor: object) -> int:
    raise AssertionError("there is no tensor in this value")


def _through(value: Any) -> Any:
    """A plain value packed, encoded, decoded and unpacked."""
    received = decode(encode(Reply(0, pack(value, _no_tensors), ()), 1 << 30))
    assert isinstance(received, Reply)
    return unpack(received.result, [])


def _same(left: Any, right: Any) -> bool:
    """Equal in value and type at every level; NaN equals NaN and -0.0 doesn't equal 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict):
        return _same(list(left.items()), list(right.items()))
    return bool(left == right)


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


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30])
def test_integers_beyond_64_bits_are_the_callers_error(number: int) -> None:
    """MessagePack has 64 bits; the error comes before anything is sent, for values and for keys."""
    for value in (number, [number], {number: 1}):
        with pytest.raises(LocalProtocolError, match="can't be sent"):
            encode(Reply(0, pack(value, _no_tensors), ()))


@pytest.mark.parametrize("number", [2**64 - 1, 2**63, -(2**63), 0, -1])
def test_integers_of_64_bits_arrive(number: int) -> None:
    """Signed and unsigned 64-bit integers arrive unchanged."""
    assert _same(_through({number: number}), {number: number})


def test_text_that_is_no_unicode_is_the_callers_error() -> None:
    """A lone surrogate has no UTF-8."""
    with pytest.raises(LocalProtocolError, match="can't be sent"):
        encode(Reply(0, "\ud800", ()))


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


# --- values -----------------------------------------------------------------------------------------------------------

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.binary(max_size=20),
)
_keys = st.text(st.characters(exclude_categories=("Cs",)), max_size=8) | st.integers(-(2**63), 2**64 - 1)
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(_keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_values)
@settings(max_examples=200, deadline=None)
def test_plain_values_round_trip(value: Any) -> None:
    """Nested plain values arrive equal and of the same types: tuples as tuples, int keys as int, in order."""
    assert _same(_through(value), value)


@given(st.recursive(st.integers(0, 9).map(lambda index: ("tensor", index)), lambda inner: st.lists(inner, max_size=3)))
@settings(max_examples=50, deadline=None)
def test_tensors_travel_by_index(plan: Any) -> None:
    """Every tensor is exported once, in order, and the tensor of that index stands in its place on arrival."""
    pool = [torch.tensor(number) for number in range(10)]
    exported: list[torch.Tensor] = []

    def fill(part: Any) -> Any:
        return pool[part[1]] if isinstance(part, tuple) else [fill(item) for item in part]

    def export(tensor: Any) -> int:
        exported.append(tensor)
        return len(exported) - 1

    value = fill(plan)
    received = decode(encode(Reply(0, pack(value, export), ())))
    assert isinstance(received, Reply)

    def same_objects(left: Any, right: Any) -> bool:
        if isinstance(right, list):
            return isinstance(left, list) and len(left) == len(right) and all(map(same_objects, left, right))
        return left is right

    assert same_objects(unpack(received.result, exported), value)


def test_numpy_arrays_arrive_as_read_only_arrays() -> None:
    """An array is not turned into a tensor, and the borrowed bytes can't be written through it."""
    packed = pack([np.arange(3), torch.arange(3)], lambda value: int(isinstance(value, torch.Tensor)))
    array, tensor = unpack(packed, [torch.arange(3), torch.arange(4)])
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [0, 1, 2]
    assert not array.flags.writeable
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == [0, 1, 2, 3]


def test_numpy_scalars_travel_as_plain_values() -> None:
    """A numpy scalar arrives as the Python value of its kind."""
    value = [np.int64(-5), np.uint8(200), np.float32(0.5), np.float64(1e300), np.bool_(True), np.str_("x")]
    assert _same(_through(value), [-5, 200, 0.5, 1e300, True, "x"])


def test_subclasses_of_containers_arrive_as_plain_ones() -> None:
    """A named tuple arrives as a tuple, a dict's subclass as a dict."""

    class Point(NamedTuple):
        x: int
        y: int

    class Mapping(dict):  # type: ignore[type-arg]
        pass

    assert _same(_through([Point(1, 2), Mapping(a=1)]), [(1, 2), {"a": 1}])


class _Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        1 + 2j,
        range(3),
        len,
        Exception("x"),
        bytearray(b"x"),
        memoryview(b"x"),
        _Colour.RED,
        Ext(1, b"\0\0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsendable_types_are_the_callers_error(value: Any) -> None:
    """The error names the type and what can be sent, at every depth."""
    for nested in (value, [value], (1, value), {"a": {"b": value}}):
        with pytest.raises(
            LocalProtocolError, match=f"type {type(value).__name__} can't be sent; tensors, numpy arrays"
        ):
            pack(nested, _no_tensors)


class _OwnInt(int):
    pass


@pytest.mark.parametrize(
    "key",
    [True, _OwnInt(3), _Colour.RED, np.str_("x"), 1.5, None, b"x", (1, 2), np.int64(1)],
    ids=lambda key: type(key).__name__,
)
def test_other_keys_are_the_callers_error(key: Any) -> None:
    """Dict keys are str or int exactly: what ``pack`` accepts, the peer's ``unpack`` accepts."""
    with pytest.raises(LocalProtocolError, match=f"keys must be str or int, not {type(key).__name__}"):
        pack({key: 1}, _no_tensors)


@pytest.mark.parametrize("make", [np.longdouble, np.clongdouble])
def test_long_doubles_are_the_callers_error(make: Callable[[int], Any]) -> None:
    """A numpy scalar without a Python counterpart is refused."""
    with pytest.raises(LocalProtocolError):
        pack(make(1), _no_tensors)


# --- nesting ----------------------------------------------------------------------------------------------------------


def _nest(depth: int, wrap: Callable[[Any], Any], core: Any = 1) -> Any:
    for _ in range(depth):
        core = wrap(core)
    return core


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"k": x}], ids=["list", "tuple", "dict"])
def test_nesting_is_limited_at_home(wrap: Callable[[Any], Any]) -> None:
    """The deepest nesting that is allowed arrives, also with a tensor inside; one more is refused with the limit."""
    assert _same(_through(_nest(MAX_DEPTH, wrap)), _nest(MAX_DEPTH, wrap))
    tensor = torch.ones(1)
    deepest = unpack(pack(_nest(MAX_DEPTH, wrap, tensor), lambda _tensor: 0), [tensor])
    assert pack(deepest, lambda value: int(value is not tensor)) == pack(
        _nest(MAX_DEPTH, wrap, tensor), lambda _tensor: 0
    )
    with pytest.raises(LocalProtocolError, match=f"{MAX_DEPTH} deep"):
        pack(_nest(MAX_DEPTH + 1, wrap), _no_tensors)


def test_a_value_that_contains_itself_is_refused() -> None:
    """A cycle is too deep, not an endless loop."""
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(LocalProtocolError, match="deep"):
        pack(cycle, _no_tensors)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"k": x}], ids=["list", "dict"])
def test_a_peers_nesting_is_limited(wrap: Callable[[Any], Any]) -> None:
    """Values nested deeper than ``pack`` makes them are the peer's error."""
    with pytest.raises(PeerProtocolError, match=f"{MAX_DEPTH} deep"):
        unpack(_nest(MAX_DEPTH + 2, wrap), [])


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1k", b"\x81\x91"], ids=["list", "dict", "list as key"])
def test_endless_nesting_in_a_peers_bytes_is_its_error(opener: bytes) -> None:
    """Bytes that nest far beyond the interpreter's recursion limit raise no RecursionError here."""
    reply = encode(Reply(0, None, ()))
    head = reply[: reply.index(b"\xc0")]
    with pytest.raises(PeerProtocolError):
        decode(head + opener * 30_000 + b"\x01\x90")


# --- what a peer may send ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Ext(1, b"\2\0"),
        Ext(1, b"\0"),
        Ext(1, b"\0\0\0"),
        Ext(1, b""),
        Ext(1, b"\xff\xff"),
        Ext(2, b"\2\0"),
        Ext(3, b""),
        Ext(4, b"\0\0"),
        Ext(-128, b"\0\0"),
        [1, Ext(3, b"")],
        {"k": Ext(3, b"")},
        {None: 1},
        {True: 1},
        {1.5: 1},
        {b"k": 1},
        {(1, 2): 1},
        1 + 2j,
        {1, 2},
    ],
    ids=repr,
)
def test_values_that_pack_never_makes_are_the_peers_error(value: Any) -> None:
    """Wrong indices, codes, lengths, keys, types and misplaced markers are refused."""
    with pytest.raises(PeerProtocolError):
        unpack(value, [torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.complex32])
def test_an_array_of_a_dtype_that_numpy_lacks_is_the_peers_error(dtype: torch.dtype) -> None:
    """A peer that calls a bfloat16 tensor a numpy array gets an error, not this side's TypeError."""
    with pytest.raises(PeerProtocolError, match="numpy"):
        unpack(Ext(2, b"\0\0"), [torch.frombuffer(bytearray(8), dtype=dtype)])


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
@settings(max_examples=400, deadline=None)
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
@settings(max_examples=500, deadline=None)
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
@settings(max_examples=200, deadline=None)
def test_random_extensions_raise_only_the_peers_error(data: bytes, code: int) -> None:
    """Extensions, timestamps among them, of any code and content: the peer's error or one of the tensors."""
    header = bytes((0xC7, len(data), code & 0xFF))
    _receive(PREAMBLE + b"\x94\x07\x00" + header + data + b"\x90")
    _receive(PREAMBLE + b"\x94\x07\x00\x81" + header + data + b"\x01\x90")
