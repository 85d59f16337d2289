"""What the compiled decoder accepts is what the specification accepts, and it makes the same of it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from shmtransport.core.codec import ARGUMENT_DEPTH, MAGIC_BYTE, PREAMBLE, REPLY_TAG, REQUEST_TAG
from shmtransport.core.layout import FORMAT_VERSION
from shmtransport.errors import PeerProtocolError
from shmtransport.memory.descriptor import MAX_DIMENSIONS, TensorDescriptor
from shmtransport.protocol import values
from shmtransport.protocol.messages import MAX_TENSORS, Reply, Request, decode
from shmtransport.protocol.values import decode_unread, pack, unpack
from tests.support.arenas import Pair
from tests.support.cores import native_twin, needs_native
from tests.support.messages import MESSAGES
from tests.unit.core.test_twin_encoders import _Exporter, _values

pytestmark = needs_native

_TENSORS = tuple(torch.full((2,), index) for index in range(MAX_TENSORS))


def _plain(value: Any) -> Any:
    """A value in a form that compares by content and type, tensors and arrays too."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_plain(item) for item in value]
    if isinstance(value, dict):
        return "dict", [(_plain(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, torch.Tensor):
        return "tensor", value.tolist()
    if isinstance(value, np.ndarray):
        return "array", value.tolist(), value.flags.writeable
    return type(value).__name__, repr(value)


def _specified(data: bytes) -> Any:
    """A request or reply by msgspec and ``unpack``; None if it is refused, or another message."""
    try:
        message = decode(data)
        if type(message) is Request:
            tensors = _TENSORS[: len(message.tensors)]
            arguments = tuple(unpack(one, tensors, ARGUMENT_DEPTH) for one in message.arguments)
            keywords = {name: unpack(one, tensors, ARGUMENT_DEPTH) for name, one in message.keywords.items()}
            return message.call_id, message.method, message.tensors, _plain((arguments, keywords))
        if type(message) is Reply:
            result = unpack(message.result, _TENSORS[: len(message.tensors)])
            return message.call_id, None, message.tensors, _plain(result)
    except PeerProtocolError:
        pass
    return None


def _to_array(tensor: torch.Tensor) -> Any:
    array = tensor.numpy()
    array.flags.writeable = False
    return array


def _compiled(data: bytes) -> Any:
    """The same by the compiled core; what it takes as a whole is the same again."""
    assert native_twin is not None
    call = native_twin.decode_call(data, TensorDescriptor)
    if call is None:
        assert _taken(data) is None
        return None
    call_id, method, descriptors, start = call
    tag = REPLY_TAG if method is None else REQUEST_TAG
    tensors = _TENSORS[: len(descriptors)]
    values = _plain(native_twin.decode_values(tag, data, start, tensors, _to_array))
    taken = _taken(data)
    if taken is not None:
        assert taken[:3] == (call_id, method, len(descriptors))
        assert descriptors or taken == (call_id, method, 0, 0, values)
    else:
        assert descriptors, "a message without tensors was left"
    return call_id, method, descriptors, values


def _taken(data: bytes) -> Any:
    """What the compiled core takes as a whole: call id, method, tensors, their bytes, values; nothing is borrowed."""
    assert native_twin is not None
    borrows = _borrows()
    request = native_twin.take_call(data, REQUEST_TAG, borrows)
    reply = native_twin.take_call(data, REPLY_TAG, borrows)
    assert request is None or reply is None
    taken = None
    if request is not None:
        call_id, method, (arguments, keywords), tensors, nbytes = request
        taken = call_id, method, tensors, nbytes, _plain((arguments, keywords))
        del arguments, keywords
    elif reply is not None:
        call_id, result, tensors, nbytes = reply
        taken = call_id, None, tensors, nbytes, _plain(result)
        del result
    del request, reply
    assert len(borrows) == 0
    return taken


@functools.cache
def _borrows() -> Any:
    """The compiled borrows of an arena of a page; its memory lives as long as they do."""
    pair = Pair(4096, slots=4, core=native_twin)
    pair.close()
    return pair.receive.borrows


def _message(*fields: Any) -> bytes:
    return PREAMBLE + msgspec.msgpack.encode(list(fields))


def _request(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bytes | None:
    exporter = _Exporter()
    try:
        packed = [pack(one, exporter.add, ARGUMENT_DEPTH) for one in arguments]
        named = {name: pack(one, exporter.add, ARGUMENT_DEPTH) for name, one in keywords.items()}
        return _message(REQUEST_TAG, 3, "method", packed, named, exporter.descriptors)
    except Exception:  # noqa: BLE001 - not to be sent
        return None


@given(st.lists(_values, max_size=3).map(tuple), st.dictionaries(st.text("abc", max_size=3), _values, max_size=3))
@settings(max_examples=300)
def test_what_is_sent_is_understood_alike(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Whatever can be sent."""
    data = _request(arguments, keywords)
    if data is not None:
        expected = _specified(data)
        assert expected is not None
        assert _compiled(data) == expected


_raw = st.deferred(
    lambda: st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(width=32),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=4),
        st.binary(max_size=4),
        st.builds(Ext, st.integers(-2, 4), st.binary(max_size=3)),
        st.builds(Ext, st.integers(1, 2), st.sampled_from([b"\0\0", b"\1\0", b"\0\1"])),
        st.lists(_raw, max_size=3),
        st.lists(_raw, max_size=3).map(lambda items: [Ext(3, b""), *items]),
        st.dictionaries(st.text("ab", max_size=2) | st.integers(-3, 300) | st.booleans() | st.none(), _raw, max_size=3),
    )
)
_count = st.one_of(st.integers(0, 300), st.sampled_from([-1, 2**63 - 1, 2**63, 1.0, None, "1", True]))
_descriptor = st.one_of(
    st.builds(
        lambda offset, shape, dtype, slot, sequence: [offset, shape, dtype, slot, sequence],
        _count,
        st.lists(_count, max_size=3),
        st.sampled_from(["float32", "é", "", 1]),
        _count,
        _count,
    ),
    st.just([0, [1], "int8", 0, 1]),
    _raw,
)
_fields = st.one_of(
    st.tuples(
        st.just(REQUEST_TAG),
        _count,
        st.sampled_from(["m", "é" * 256, "é" * 257, "", 1, None]),
        st.one_of(st.lists(_raw, max_size=3), _raw),
        st.one_of(st.dictionaries(st.sampled_from(["a", "b", 1]), _raw, max_size=2), _raw),
        st.lists(_descriptor, max_size=3),
    ),
    st.tuples(st.just(REPLY_TAG), _count, _raw, st.one_of(st.lists(_descriptor, max_size=3), _raw)),
    st.tuples(st.sampled_from([REPLY_TAG, REQUEST_TAG, 5, 8, -7, 7.0, "7"]), _raw),
)


@given(_fields)
@settings(max_examples=1500)
def test_whatever_fields_come_both_take_the_same(fields: tuple[Any, ...]) -> None:
    """Every field of the right type or another, in range or not."""
    data = _message(*fields)
    assert _compiled(data) == _specified(data)


_seeds = [
    _message(REPLY_TAG, 5, [1, "é", {"k": [Ext(1, b"\0\0"), 2.5]}, [Ext(3, b""), None]], [[64, [2], "int8", 1, 9]]),
    _message(REQUEST_TAG, 300, "add", [-1, -200, 70000, b"xyz", Ext(2, b"\0\0")], {"k": True}, [[0, [], "bool", 0, 1]]),
    _message(REPLY_TAG, 2**40, {"a" * 40: list(range(20)), 7: "x" * 300}, []),
    _message(REQUEST_TAG, 0, "", [[[[[]]]], {}], {}, []),
]


def test_mutated_messages_are_taken_alike() -> None:
    """Bytes changed, cut out, doubled, put in; also beyond the end and before the beginning of a message."""
    source = random.Random(20)
    accepted = 0
    for _ in range(60_000):
        data = bytearray(source.choice(_seeds))
        for _ in range(source.randint(1, 3)):
            at = source.randrange(2, len(data) + 1)
            way = source.randrange(4)
            if way == 0 and at < len(data):
                data[at] = source.choice((source.randrange(256), source.randrange(0xC0, 0x100), data[at] ^ 1))
            elif way == 1:
                del data[at : at + source.randint(1, 3)]
            elif way == 2:
                data[at:at] = source.randbytes(source.randint(1, 2))
            else:
                data[at:at] = data[at : at + source.randint(1, 9)]
        expected = _specified(bytes(data))
        accepted += expected is not None
        assert _compiled(bytes(data)) == expected, bytes(data).hex()
    assert accepted > 3000


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_each_kind_of_message_is_taken_alike(message: Any) -> None:
    """All but requests and replies are the specification's."""
    data = PREAMBLE + msgspec.msgpack.encode(message)
    assert _compiled(data) == _specified(data)


def _outcome_of(decoder: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decoder(data)
    except PeerProtocolError as error:
        return str(error)


_BODIES: list[tuple[Any, ...]] = [
    (),
    (3,),
    (3, None, []),
    (3, "method", [1], {"k": 2}, []),
    (3, "handler", "ValueError", "no such layer"),
    (3, "handler", "ValueError", "no such layer", None),
]


@pytest.mark.parametrize(
    "tag", [*(tag for tag in range(40) if tag not in (REQUEST_TAG, REPLY_TAG)), 128, 2**63, -1, "6"]
)
def test_every_other_tag_is_left_to_the_specification(tag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known there or not, and whatever follows it: the compiled core neither takes nor refuses it."""
    assert native_twin is not None
    monkeypatch.setattr(values, "decode_call", native_twin.decode_call)
    for body in _BODIES:
        data = _message(tag, *body)
        assert native_twin.decode_call(data, TensorDescriptor) is None
        assert _outcome_of(decode_unread, data) == _outcome_of(decode, data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PREAMBLE[:1],
        PREAMBLE,
        bytes((MAGIC_BYTE, FORMAT_VERSION - 1)) + b"\x94\x07\x00\xc0\x90",
        bytes((MAGIC_BYTE, FORMAT_VERSION + 1)) + b"\x94\x07\x00\xc0\x90",
        bytes((0, FORMAT_VERSION)) + b"\x94\x07\x00\xc0\x90",
    ],
)
def test_other_preambles_are_left_to_the_specification(data: bytes) -> None:
    """Too short, of another version, of another protocol."""
    assert _compiled(PREAMBLE + b"\x94\x07\x00\xc0\x90") is not None
    assert _compiled(data) is None


@pytest.mark.parametrize("depth", [0, 1, 29, 30, 31, 32, 33, 34, 300])
@pytest.mark.parametrize(
    "inner", [1, [], {}, Ext(1, b"\0\0"), [Ext(3, b"")]], ids=["int", "list", "dict", "tensor", "tuple"]
)
def test_both_stop_at_the_same_depth(depth: int, inner: Any) -> None:
    """In lists, tuples and dicts."""
    for wrap in (lambda value: [value], lambda value: [Ext(3, b"x"), value], lambda value: {"k": value}):
        value = inner
        for _ in range(depth):
            value = wrap(value)
        for data in (
            _message(REPLY_TAG, 0, value, [[0, [1], "int8", 0, 1]]),
            _message(REQUEST_TAG, 0, "m", [value], {"k": value}, [[0, [1], "int8", 0, 1]]),
        ):
            assert _compiled(data) == _specified(data)


@pytest.mark.parametrize("count", [0, 1, MAX_TENSORS - 1, MAX_TENSORS, MAX_TENSORS + 1])
def test_both_take_as_many_tensors(count: int) -> None:
    """And the index of the last of them, but no further one."""
    for index in (count - 1, count):
        value = [Ext(1, max(index, 0).to_bytes(2, "little"))]
        data = _message(REPLY_TAG, 0, value, [[0, [1], "int8", 0, 1]] * count)
        assert _compiled(data) == _specified(data)


@pytest.mark.parametrize("dimensions", [0, MAX_DIMENSIONS, MAX_DIMENSIONS + 1])
def test_both_take_as_many_dimensions(dimensions: int) -> None:
    """One more is no descriptor."""
    data = _message(REPLY_TAG, 0, None, [[0, [1] * dimensions, "int8", 0, 1]])
    assert _compiled(data) == _specified(data)


@given(st.binary(max_size=40), st.integers(-2, 50), st.sampled_from([REQUEST_TAG, REPLY_TAG, 0, 2**64 - 1]))
@settings(max_examples=500)
def test_values_that_were_not_checked_harm_nothing(data: bytes, start: int, tag: int) -> None:
    """``decode_values`` relies on nothing that ``decode_call`` has seen."""
    assert native_twin is not None
    with contextlib.suppress(PeerProtocolError, UnicodeDecodeError):
        native_twin.decode_values(tag, data, start, _TENSORS[:2], _to_array)


def test_texts_are_taken_alike() -> None:
    """Valid UTF-8 and nothing else: no overlong form, no surrogate, nothing beyond U+10FFFF, nothing cut."""
    second = (b"", b"\x7f", b"\x80", b"\x8f", b"\x90", b"\x9f", b"\xa0", b"\xbf", b"\xc0")
    later = (b"", b"\x7f", b"\x80", b"\xbf", b"\xc0")
    accepted = 0
    for first, *rest in itertools.product(range(256), second, later, later):
        text = bytes((first,)) + b"".join(rest)
        data = PREAMBLE + b"\x94\x07\x00" + bytes((0xA0 | len(text),)) + text + b"\x90"
        try:
            expected = _plain(text.decode())
        except UnicodeDecodeError:
            assert _compiled(data) is None, text
        else:
            assert _compiled(data)[3] == expected
            accepted += 1
    assert accepted > 1000
