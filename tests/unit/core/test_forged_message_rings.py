"""What the owner of a message ring writes in its cells and records: at worst PeerProtocolError, never a stray read."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmtransport.errors import PeerProtocolError
from tests.support.rings import CELLS_BYTES, CONSUMED, ENDED, PUBLISHED, WANTS_ROOM, Forger, RingPair, record_bytes

LARGEST = 60
CAPACITY = 128
_CELL = st.one_of(st.integers(0, 2 * CAPACITY), st.integers(0, 2**64 - 1))
_LENGTH = st.one_of(st.integers(0, 2 * CAPACITY), st.integers(0, 2**32 - 1))


@pytest.fixture
def rings(core: ModuleType) -> Iterator[RingPair]:
    made = RingPair(LARGEST, core)
    assert made.capacity == CAPACITY
    yield made
    made.close()


@pytest.fixture
def forger(rings: RingPair) -> Forger:
    """Side A, hostile."""
    return Forger(rings.segment_a, rings.capacity)


def _read_on(rings: RingPair, size: int) -> None:
    """Let side A write a message and side B read it."""
    assert rings.a.write(bytes(size))
    assert rings.b.read() == bytes(size)


# --- published --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "published",
    [0, 8, 56, 64 + CAPACITY + 8, 64 + 2 * CAPACITY, 2**32, 2**63, 2**64 - 8],
    ids=lambda published: f"at {published}",
)
def test_published_that_goes_back_or_beyond_the_ring_is_the_peers_error(
    rings: RingPair, forger: Forger, published: int
) -> None:
    """64 bytes were read: positions below that, and beyond that by more than the ring takes, are impossible."""
    _read_on(rings, LARGEST)
    forger.set_cell(PUBLISHED, published)
    for _ in range(2):
        with pytest.raises(PeerProtocolError, match=f"published {published - 64} bytes beyond .* takes {CAPACITY}"):
            rings.b.read()


@pytest.mark.parametrize("misaligned", [1, 4, 7, 12, 127])
def test_published_that_is_misaligned_is_the_peers_error(rings: RingPair, forger: Forger, misaligned: int) -> None:
    """Records end on 8 bytes: a position between is never one of theirs."""
    rings.a.write(bytes(LARGEST))
    forger.set_cell(PUBLISHED, misaligned)
    with pytest.raises(PeerProtocolError, match=f"published {misaligned} bytes"):
        rings.b.read()


def test_a_refused_position_moves_nothing(rings: RingPair, forger: Forger) -> None:
    """After an error this side has read nothing further, and doesn't announce any reading to the peer."""
    _read_on(rings, LARGEST)
    forger.set_cell(PUBLISHED, 2**64 - 8)
    with pytest.raises(PeerProtocolError):
        rings.b.read()
    assert Forger(rings.segment_b, rings.capacity).cell(CONSUMED) == 64
    assert rings.b.readable()
    forger.set_cell(PUBLISHED, 64)
    rings.a.write(b"again")
    assert rings.b.read() == b"again"


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [61, 64, CAPACITY, 2**31, 2**32 - 8, 2**32 - 1])
@pytest.mark.parametrize("start", [0, 64])
def test_a_record_longer_than_what_is_unread_is_the_peers_error(
    rings: RingPair, forger: Forger, length: int, start: int
) -> None:
    """Its length would reach beyond what was published, and often beyond the ring."""
    for _ in range(start // 64):
        _read_on(rings, LARGEST)
    rings.a.write(bytes(LARGEST))
    forger.set_length(start, length)
    with pytest.raises(PeerProtocolError, match=f"a record of {length} bytes; 64 are there"):
        rings.b.read()


@pytest.mark.parametrize("length", [LARGEST + 1, CAPACITY - 4])
def test_a_record_beyond_the_largest_message_is_refused(rings: RingPair, forger: Forger, length: int) -> None:
    """A length that joins two records stays within what was published, and is more than was agreed."""
    rings.a.write(b"a" * LARGEST)
    rings.a.write(b"b" * LARGEST)
    forger.set_length(0, length)
    with pytest.raises(PeerProtocolError, match=f"a message of {length} bytes; {LARGEST} were agreed"):
        rings.b.read()


@given(consumed=st.integers(0, CAPACITY // 8), published=_CELL, length=_LENGTH, records=st.binary(max_size=CAPACITY))
@settings(max_examples=300)
def test_whatever_is_written_a_read_stays_within_the_ring(
    core: ModuleType, consumed: int, published: int, length: int, records: bytes
) -> None:
    """A read gives bytes between the two positions, or PeerProtocolError, or None; nothing of what lies around it."""
    pair = RingPair(LARGEST, core)
    forger = Forger(pair.segment_a, CAPACITY)
    try:
        for _ in range(consumed):
            _read_on(pair, 4)
        start = 8 * consumed
        content = bytes(byte & 0x7F for byte in records.ljust(CAPACITY, b"\x55"))
        forger.set_records(content)
        forger.mark_surroundings(0xEE)
        forger.set_length(start, length)
        forger.set_cell(PUBLISHED, published)
        around = start % CAPACITY
        content = content[:around] + length.to_bytes(4, "little") + content[around + 4 :]
        unread = published - start
        try:
            received = pair.b.read()
        except PeerProtocolError:
            assert unread < 0 or unread > CAPACITY or unread % 8 or record_bytes(length) > unread or length > LARGEST
            return
        if received is None:
            assert unread == 0
            return
        assert received == (content * 2)[around + 4 : around + 4 + length]
        assert len(received) == length
        assert record_bytes(length) <= unread <= CAPACITY
        assert length <= LARGEST
    finally:
        pair.close()


def test_garbage_is_read_to_its_end_or_refused(rings: RingPair, forger: Forger) -> None:
    """A whole ring of empty messages: every message is counted, so that no reader is kept busy forever."""
    forger.set_records(bytes(CAPACITY))
    forger.set_cell(PUBLISHED, CAPACITY)
    assert [rings.b.read() for _ in range(CAPACITY // 8)] == [b""] * (CAPACITY // 8)
    assert rings.b.read() is None


# --- consumed ---------------------------------------------------------------------------------------------------------


def _fill(ring: Any) -> None:
    while ring.write(bytes(LARGEST)):
        pass


@pytest.mark.parametrize("consumed", [129, 136, 256, 2**63, 2**64 - 1])
def test_consumed_beyond_published_is_the_peers_error(rings: RingPair, forger: Forger, consumed: int) -> None:
    """A peer can't have read what was never written; nothing is overwritten either."""
    _fill(rings.b)
    forger.set_cell(CONSUMED, consumed)
    with pytest.raises(PeerProtocolError, match=f"has read {consumed} bytes of messages; between 0 and 128 are"):
        rings.b.write(b"x")
    assert Forger(rings.segment_b, CAPACITY).cell(PUBLISHED) == CAPACITY


def test_consumed_that_goes_back_is_the_peers_error(rings: RingPair, forger: Forger) -> None:
    """What was once said to be read stays read."""
    _fill(rings.b)
    forger.set_cell(CONSUMED, 64)
    assert rings.b.write(bytes(LARGEST))
    for consumed in (0, 63):
        forger.set_cell(CONSUMED, consumed)
        with pytest.raises(PeerProtocolError, match=f"has read {consumed} bytes of messages; between 64 and 192 are"):
            rings.b.write(b"x")


@given(cells=st.lists(_CELL, min_size=1, max_size=8), size=st.integers(0, LARGEST))
@settings(max_examples=200)
def test_whatever_is_said_to_be_read_the_writer_stays_within_the_ring(
    core: ModuleType, cells: list[int], size: int
) -> None:
    """A write is done, has no room, or raises PeerProtocolError; it never touches what lies around its ring."""
    pair = RingPair(LARGEST, core)
    forger, own = Forger(pair.segment_a, CAPACITY), Forger(pair.segment_b, CAPACITY)
    try:
        own.mark_surroundings(0xEE)
        before = bytes(pair.segment_b.view)
        start = pair.segment_b.layout.message_ring_offset
        end = start + CELLS_BYTES + CAPACITY
        for cell in cells:
            forger.set_cell(CONSUMED, cell)
            published = own.cell(PUBLISHED)
            try:
                written = pair.b.write(bytes(size))
            except PeerProtocolError:
                written = False
            assert own.cell(PUBLISHED) == published + written * record_bytes(size)
        after = bytes(pair.segment_b.view)
        assert after[:start] == before[:start]
        assert after[end:] == before[end:]
    finally:
        pair.close()


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [1, 2, 2**63, 2**64 - 1])
def test_any_flag_but_0_is_a_flag(rings: RingPair, forger: Forger, flag: int) -> None:
    """Whatever stands there: a post too many, or the end, which was the peer's to say."""
    rings.a.write(b"x")
    forger.set_cell(WANTS_ROOM, flag)
    forger.set_cell(ENDED, flag)
    assert not rings.b.ended()
    assert rings.b.read() == b"x"
    assert rings.a.take_post()
    assert rings.b.ended()
