"""Both encoders, given the same values: the same bytes, or an error of the same class."""

from __future__ import annotations

import enum
from collections import OrderedDict
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from shmtransport.core import python_twin
from shmtransport.errors import LocalProtocolError
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.messages import UNSENDABLE, Reply, Request, decode, encode
from shmtransport.protocol.values import pack
from tests.support.cores import native_twin, needs_native
from tests.unit.core.test_twins import outcome

pytestmark = needs_native


class _OwnInt(int):
    pass


class _OwnText(str):
    __slots__ = ()


class _Colour(enum.IntEnum):
    RED = 1


class _Point(NamedTuple):
    x: Any
    y: Any


_TENSOR, _ARRAY = torch.ones(2), np.ones(2)
_edges = [2**bits + by for bits in (5, 7, 8, 15, 16, 31, 32, 63, 64) for by in (-1, 0, 1)]
_numbers = st.one_of(st.sampled_from(_edges + [-edge for edge in _edges]), st.integers())
_sizes = st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 65535, 65536])
_leaves = st.one_of(
    st.none(),
    st.booleans(),
    _numbers,
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    _sizes.map(lambda size: "x" * size),
    _sizes.map(lambda size: "é" * size),
    _sizes.map(bytes),
    st.sampled_from([_TENSOR, _ARRAY, np.float32(0.5), np.int64(3), _OwnInt(3), _OwnText("x"), _Colour.RED, {1}, 1j]),
)
_keys = st.one_of(
    st.text(max_size=4), _numbers, st.sampled_from([True, None, 1.5, b"x", (), _OwnInt(3), _OwnText("x")])
)
_good_keys = st.one_of(st.text(st.characters(exclude_categories=("Cs",)), max_size=4), st.integers(-(2**63), 2**64 - 1))


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=4)
    dicts = st.one_of(st.dictionaries(_good_keys, inner, max_size=4), st.dictionaries(_keys, inner, max_size=2))
    return st.one_of(
        lists,
        lists.map(tuple),
        dicts,
        dicts.map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: _Point(*pair)),
        _sizes.filter(lambda size: size < 300).map(lambda size: [0] * size),
        _sizes.filter(lambda size: size < 300).map(lambda size: (0,) * size),
        _sizes.filter(lambda size: size < 300).map(lambda size: dict.fromkeys(range(size))),
    )


_values = st.recursive(_leaves, _nested, max_leaves=10)


def _deep(depth: int, value: Any, kind: int) -> Any:
    for _ in range(depth):
        value = ([value], (value,), {"k": value})[kind]
    return value


class _Exporter:
    """Gives each tensor a descriptor, as a send arena does."""

    def __init__(self) -> None:
        self.descriptors: list[TensorDescriptor] = []

    def add(self, tensor: Any) -> int:
        number = len(self.descriptors)
        self.descriptors.append(TensorDescriptor(64 * number, tuple(tensor.shape), "float32", number, 2**40 + number))
        return number

    def pack(self, value: Any, depth: int) -> Any:
        return pack(value, self.add, depth)


def _encoded(twin: ModuleType, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    """What comes of a request with these arguments, and of a reply with the first: bytes or an error's class."""
    results = []
    for act in (
        lambda exporter: twin.encode_request(
            7, "method", arguments, keywords, exporter.pack, exporter.descriptors, None
        ),
        lambda exporter: twin.encode_reply(2**63 - 1, arguments[0], exporter.pack, exporter.descriptors, None),
    ):
        result = outcome(lambda act=act: act(_Exporter()))  # type: ignore[misc]
        kind = result[0] if type(result) is tuple else result
        # Where a value has two faults, either is found first; the caller makes one class of both.
        results.append(LocalProtocolError if kind in UNSENDABLE else kind)
    return results


@given(
    st.lists(_values, min_size=1, max_size=3).map(tuple),
    st.dictionaries(st.text("abc", max_size=3), _values, max_size=3),
)
@settings(max_examples=600)
def test_both_encode_alike(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Whatever the values are: sendable, beyond a limit, or of no type that can be sent."""
    assert native_twin is not None
    assert _encoded(native_twin, arguments, keywords) == _encoded(python_twin, arguments, keywords)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("value", [1, _TENSOR, [], _OwnInt(1), 2**64, "\ud800", _Point(1, 2)], ids=repr)
@pytest.mark.parametrize("depth", [0, 1, 28, 29, 30, 31, 32, 33, 200])
def test_both_stop_at_the_same_depth(kind: int, value: Any, depth: int) -> None:
    """A container beyond the limit is refused, a plain value or a tensor just below it is not."""
    assert native_twin is not None
    arguments = (_deep(depth, value, kind),)
    assert _encoded(native_twin, arguments, {}) == _encoded(python_twin, arguments, {})


def test_the_bytes_are_those_of_the_messages(core: ModuleType) -> None:
    """A request and a reply decode as what they are; encoding those again gives the same bytes."""
    exporter = _Exporter()
    data, *_ = core.encode_request(
        5, "add", (1, (_TENSOR, [_ARRAY])), {"k": None}, exporter.pack, exporter.descriptors, None
    )
    request = decode(data)
    assert isinstance(request, Request)
    assert (request.call_id, request.method, request.tensors) == (5, "add", tuple(exporter.descriptors))
    assert encode(request) == data
    data, *_ = core.encode_reply(6, {"x": _TENSOR}, exporter.pack, exporter.descriptors, None)
    reply = decode(data)
    assert isinstance(reply, Reply)
    assert encode(reply) == data


def test_keywords_of_a_subclass_of_str_are_sent(core: ModuleType) -> None:
    """Python takes them as names of keyword arguments."""
    data, *_ = core.encode_request(0, "m", (), {_OwnText("x"): 1}, _Exporter().pack, [], None)
    assert decode(data) == Request(0, "m", [], {"x": 1}, ())


def test_what_packing_raises_comes_out(core: ModuleType) -> None:
    """No error of an export is lost, at any depth."""

    def fail(_value: Any, _depth: int) -> Any:
        raise LocalProtocolError("no room")

    for value in (_TENSOR, [1, _TENSOR], {"a": (_TENSOR,)}):
        with pytest.raises(LocalProtocolError, match="no room"):
            core.encode_request(0, "m", (1, value), {}, fail if core is native_twin else _failing(fail), [], None)


def _failing(fail: Any) -> Any:
    """The Python twin asks for every value: fail with the tensor only."""
    return lambda value, depth: pack(value, lambda tensor: fail(tensor, 0), depth)


_COUNTS = [edge + by for edge in (0, 1, 2, 4, 8, 16, 32, 128, 256, 65536) for by in (-1, 0, 1) if edge + by >= 0]


@pytest.mark.parametrize("count", _COUNTS)
def test_both_count_alike(count: int) -> None:
    """Texts, bytes, extensions, lists, tuples and dicts of every size whose header is another."""
    assert native_twin is not None
    values = ("x" * count, b"x" * count, [None] * count, (None,) * count, dict.fromkeys(range(count)), count, -count)
    assert _encoded(native_twin, (values,), {"k": values}) == _encoded(python_twin, (values,), {"k": values})
    extension = Ext(-5, b"x" * count)
    data, *_ = native_twin.encode_reply(0, _TENSOR, lambda _value, _depth: extension, [], None)
    assert data == encode(Reply(0, extension, ()), 1 << 20)
