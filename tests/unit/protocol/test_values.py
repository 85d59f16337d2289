"""Values in messages: what goes in comes out, and what can't be sent is the sender's error."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from shmtransport.errors import LocalProtocolError, PeerProtocolError
from shmtransport.protocol.messages import Reply, decode, encode
from shmtransport.protocol.values import MAX_DEPTH, pack, unpack
from tests.support.messages import no_tensors, same, through

# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30])
def test_integers_beyond_64_bits_are_the_callers_error(number: int) -> None:
    """MessagePack has 64 bits; the error comes before anything is sent, for values and for keys."""
    for value in (number, [number], {number: 1}):
        with pytest.raises(LocalProtocolError, match="can't be sent"):
            encode(Reply(0, pack(value, no_tensors), ()))


@pytest.mark.parametrize("number", [2**64 - 1, 2**63, -(2**63), 0, -1])
def test_integers_of_64_bits_arrive(number: int) -> None:
    """Signed and unsigned 64-bit integers arrive unchanged."""
    assert same(through({number: number}), {number: number})


def test_text_that_is_no_unicode_is_the_callers_error() -> None:
    """A lone surrogate has no UTF-8."""
    with pytest.raises(LocalProtocolError, match="can't be sent"):
        encode(Reply(0, "\ud800", ()))


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
@settings(max_examples=200)
def test_plain_values_round_trip(value: Any) -> None:
    """Nested plain values arrive equal and of the same types: tuples as tuples, int keys as int, in order."""
    assert same(through(value), value)


@given(st.recursive(st.integers(0, 9).map(lambda index: ("tensor", index)), lambda inner: st.lists(inner, max_size=3)))
@settings(max_examples=50)
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
    assert same(through(value), [-5, 200, 0.5, 1e300, True, "x"])


def test_subclasses_of_containers_arrive_as_plain_ones() -> None:
    """A named tuple arrives as a tuple, a dict's subclass as a dict."""

    class Point(NamedTuple):
        x: int
        y: int

    class Mapping(dict):  # type: ignore[type-arg]
        pass

    assert same(through([Point(1, 2), Mapping(a=1)]), [(1, 2), {"a": 1}])


class _Foreign:
    """Another library's array, as far as DLPack shows it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def test_whatever_has_dlpack_is_sent_as_a_tensor() -> None:
    """Without a copy: the tensor that is exported lies over the same memory."""
    source = torch.arange(4)
    exported: list[Any] = []
    packed = pack([_Foreign(source), 1], lambda value: exported.append(value) or 0)
    assert exported[0].data_ptr() == source.data_ptr()
    received = unpack(packed, exported)
    assert isinstance(received[0], torch.Tensor)
    assert received[0].tolist() == [0, 1, 2, 3]


def test_a_broken_dlpack_is_the_callers_error() -> None:
    """Whatever another library's code raises is told as the reason why its object can't be sent."""

    class Broken(_Foreign):
        def __dlpack__(self, **_options: Any) -> Any:
            raise BufferError("on another device")

    with pytest.raises(LocalProtocolError, match="a Broken can't be sent: its __dlpack__ failed: on another device"):
        pack([Broken(torch.ones(1))], no_tensors)


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
            pack(nested, no_tensors)


class _OwnInt(int):
    pass


@pytest.mark.parametrize("unit", ["D", "s", "ns"])
@pytest.mark.parametrize("kind", [np.datetime64, np.timedelta64])
def test_times_are_the_callers_error(kind: Callable[[int, str], Any], unit: str) -> None:
    """In nanoseconds numpy would turn one into an integer without a word."""
    with pytest.raises(LocalProtocolError, match="can't be sent"):
        pack(kind(1, unit), no_tensors)


@pytest.mark.parametrize(
    "key",
    [True, _OwnInt(3), _Colour.RED, np.str_("x"), 1.5, None, b"x", (1, 2), np.int64(1)],
    ids=lambda key: type(key).__name__,
)
def test_other_keys_are_the_callers_error(key: Any) -> None:
    """Dict keys are str or int exactly: what ``pack`` accepts, the peer's ``unpack`` accepts."""
    with pytest.raises(LocalProtocolError, match=f"keys must be str or int, not {type(key).__name__}"):
        pack({key: 1}, no_tensors)


@pytest.mark.parametrize("make", [np.longdouble, np.clongdouble])
def test_long_doubles_are_the_callers_error(make: Callable[[int], Any]) -> None:
    """A numpy scalar without a Python counterpart is refused."""
    with pytest.raises(LocalProtocolError):
        pack(make(1), no_tensors)


# --- nesting ----------------------------------------------------------------------------------------------------------


def _nest(depth: int, wrap: Callable[[Any], Any], core: Any = 1) -> Any:
    for _ in range(depth):
        core = wrap(core)
    return core


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"k": x}], ids=["list", "tuple", "dict"])
def test_nesting_is_limited_at_home(wrap: Callable[[Any], Any]) -> None:
    """The deepest nesting that is allowed arrives, also with a tensor inside; one more is refused with the limit."""
    assert same(through(_nest(MAX_DEPTH, wrap)), _nest(MAX_DEPTH, wrap))
    tensor = torch.ones(1)
    deepest = unpack(pack(_nest(MAX_DEPTH, wrap, tensor), lambda _tensor: 0), [tensor])
    assert pack(deepest, lambda value: int(value is not tensor)) == pack(
        _nest(MAX_DEPTH, wrap, tensor), lambda _tensor: 0
    )
    with pytest.raises(LocalProtocolError, match=f"{MAX_DEPTH} deep"):
        pack(_nest(MAX_DEPTH + 1, wrap), no_tensors)


def test_a_value_that_contains_itself_is_refused() -> None:
    """A cycle is too deep, not an endless loop."""
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(LocalProtocolError, match="deep"):
        pack(cycle, no_tensors)


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
