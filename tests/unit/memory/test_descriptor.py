"""Descriptors: what a peer says about a tensor is checked field by field before anything is computed from it."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmtransport.errors import PeerProtocolError
from shmtransport.memory.descriptor import MAX_DIMENSIONS, TensorDescriptor
from shmtransport.memory.dtypes import BY_NAME, TABLE

DATA_BYTES = 4096
SLOTS = 8
GOOD = TensorDescriptor(64, (2, 3), "float32", 1, 1)
_decoder = msgspec.msgpack.Decoder(TensorDescriptor)


def test_a_good_descriptor_gives_its_dtype_and_size() -> None:
    """The size is the product of the shape times the item size."""
    assert GOOD.validate(DATA_BYTES, SLOTS) == (BY_NAME["float32"], 24)


def test_a_scalar_has_one_element() -> None:
    """The empty shape is one element."""
    assert TensorDescriptor(0, (), "float64", 0, 1).validate(DATA_BYTES, SLOTS) == (BY_NAME["float64"], 8)


def test_a_tensor_may_end_at_the_last_byte() -> None:
    """The data area can be used to its end, and not one element further."""
    last = msgspec.structs.replace(GOOD, offset=DATA_BYTES - 24)
    assert last.validate(DATA_BYTES, SLOTS)[1] == 24
    with pytest.raises(
        PeerProtocolError, match=rf"{DATA_BYTES - 20}\.\.{DATA_BYTES + 4} of a data area of {DATA_BYTES}"
    ):
        msgspec.structs.replace(GOOD, offset=DATA_BYTES - 20).validate(DATA_BYTES, SLOTS)


def test_an_empty_tensor_needs_no_block() -> None:
    """Without elements there is nothing to release; asking for a release is invalid."""
    assert TensorDescriptor(0, (3, 0), "int8", 0, 0).validate(DATA_BYTES, SLOTS) == (BY_NAME["int8"], 0)
    with pytest.raises(PeerProtocolError, match="empty tensor asks for a release"):
        TensorDescriptor(0, (3, 0), "int8", 0, 1).validate(DATA_BYTES, SLOTS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
        ({"dtype": ""}, "unknown dtype"),
        ({"dtype": "__class__"}, "unknown dtype"),
        ({"offset": 66}, "offset 66 is not aligned to 4-byte"),
        ({"offset": DATA_BYTES}, "data area"),
        ({"offset": 2**63 - 64}, "data area"),
        ({"shape": (2**62, 2**62, 2**62)}, "data area"),
        ({"shape": (2**32, 2**32)}, "data area"),
        ({"shape": (1025,)}, "data area"),
        ({"slot": SLOTS}, f"release slot {SLOTS} of {SLOTS}"),
        ({"slot": 2**63 - 1}, "release slot"),
        ({"sequence": 0}, "sequence 0"),
        ({"offset": -64}, ""),
        ({"shape": (-2, -3)}, ""),
        ({"shape": (-2, 3)}, ""),
        ({"slot": -1}, ""),
        ({"sequence": -1}, ""),
        ({"shape": (1,) * (MAX_DIMENSIONS + 1)}, ""),
        ({"offset": 2**64 - 1}, ""),
        ({"offset": 1.0}, ""),
        ({"dtype": 7}, ""),
        ({"shape": 6}, ""),
        ({"shape": (2.0,)}, ""),
    ],
)
def test_each_bad_field_is_the_peers_error(change: dict[str, object], text: str) -> None:
    """A bad field is caught when decoding (type, sign, 64 bits, dimensions) or by ``validate``, which names it."""
    data = msgspec.msgpack.encode(msgspec.structs.replace(GOOD, **change))
    if not text:
        with pytest.raises(msgspec.ValidationError):
            _decoder.decode(data)
        return
    with pytest.raises(PeerProtocolError, match=text):
        _decoder.decode(data).validate(DATA_BYTES, SLOTS)


def test_an_overlong_dtype_is_cut_in_the_message() -> None:
    """A peer can't fill the log with one string."""
    with pytest.raises(PeerProtocolError) as caught:
        msgspec.structs.replace(GOOD, dtype="x" * 10_000).validate(DATA_BYTES, SLOTS)
    assert len(str(caught.value)) < 100


def test_a_descriptor_with_other_fields_is_refused() -> None:
    """Neither more nor fewer fields than five decode."""
    for fields in ([64, [2], "int8", 0], [64, [2], "int8", 0, 1, 2], {"offset": 64}):
        with pytest.raises(msgspec.ValidationError):
            _decoder.decode(msgspec.msgpack.encode(fields))


_numbers = st.one_of(st.integers(0, 2 * DATA_BYTES), st.integers(0, 2**63 - 1), st.sampled_from([0, 1, 64, 2**32]))


@given(
    st.builds(
        TensorDescriptor,
        offset=_numbers,
        shape=st.lists(_numbers | st.integers(0, 9), max_size=MAX_DIMENSIONS).map(tuple),
        dtype=st.sampled_from([row.name for row in TABLE]) | st.text(max_size=8),
        slot=_numbers | st.integers(0, SLOTS),
        sequence=_numbers,
    )
)
@settings(max_examples=400)
def test_nothing_outside_the_data_area_is_ever_accepted(descriptor: TensorDescriptor) -> None:
    """Whatever ``validate`` lets through lies in the data area, aligned, with a slot of the table."""
    try:
        row, nbytes = descriptor.validate(DATA_BYTES, SLOTS)
    except PeerProtocolError:
        return
    assert nbytes == math.prod(descriptor.shape) * row.itemsize
    if nbytes == 0:
        assert descriptor.sequence == 0
        return
    assert 0 <= descriptor.offset <= descriptor.offset + nbytes <= DATA_BYTES
    assert descriptor.offset % row.itemsize == 0
    assert descriptor.slot < SLOTS
    assert descriptor.sequence > 0


@given(
    st.sampled_from(TABLE),
    st.lists(st.integers(1, 3), max_size=4).map(tuple),
    st.integers(0, SLOTS - 1),
    st.integers(1, 2**63 - 1),
)
@settings(max_examples=100)
def test_a_descriptor_of_the_sender_is_accepted_after_the_wire(
    row: object, shape: tuple[int, ...], slot: int, sequence: int
) -> None:
    """What a send arena makes (64-byte aligned, inside) round-trips and validates."""
    descriptor = TensorDescriptor(64, shape, row.name, slot, sequence)  # type: ignore[attr-defined]
    received = _decoder.decode(msgspec.msgpack.encode(descriptor))
    assert received == descriptor
    assert received.validate(DATA_BYTES, SLOTS) == (row, math.prod(shape) * row.itemsize)  # type: ignore[attr-defined]


def test_an_empty_tensor_with_overflowing_sizes_is_refused() -> None:
    """Sizes whose product or strides overflow 64 bits are invalid, also if another size is 0."""
    with pytest.raises(PeerProtocolError):
        TensorDescriptor(0, (0, 2**62, 2**62), "float32", 0, 0).validate(DATA_BYTES, SLOTS)
