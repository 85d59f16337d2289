"""The ring: claims never overlap, fail only for want of a gap, and follow next-fit."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmtransport.layout import BLOCK_ALIGNMENT, round_up
from shmtransport.ring import Block, Ring

UNITS = 32
CAPACITY = UNITS * BLOCK_ALIGNMENT


class RingMachine(RuleBasedStateMachine):
    """Claims and releases against a model: one owner for every 64-byte unit of the area."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(CAPACITY)
        self.owners: list[int | None] = [None] * UNITS
        self.held: dict[int, Block] = {}
        self.last_position = -1

    def model_gap(self) -> int:
        """Bytes in the longest run of units without an owner."""
        runs = "".join(" " if owner is None else "x" for owner in self.owners).split("x")
        return max(map(len, runs)) * BLOCK_ALIGNMENT

    @rule(nbytes=st.one_of(st.integers(1, CAPACITY // 4), st.integers(1, CAPACITY + 65)))
    def claim(self, nbytes: int) -> None:
        gap = self.model_gap()
        block = self.ring.claim(nbytes)
        if block is None:
            assert gap < round_up(nbytes, BLOCK_ALIGNMENT), "a claim failed although a gap is large enough"
            return
        assert gap >= block.nbytes == round_up(nbytes, BLOCK_ALIGNMENT)
        assert block.offset % BLOCK_ALIGNMENT == 0
        assert 0 <= block.offset <= block.offset + block.nbytes <= CAPACITY
        units = range(block.offset // BLOCK_ALIGNMENT, (block.offset + block.nbytes) // BLOCK_ALIGNMENT)
        assert all(self.owners[unit] is None for unit in units), "a claim overlaps a held block"
        for unit in units:
            self.owners[unit] = block.offset
        self.held[block.offset] = block

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        block = self.held.pop(offset)
        self.ring.release(block)
        self.owners = [None if owner == offset else owner for owner in self.owners]
        with pytest.raises(ValueError, match="is not held"):
            self.ring.release(block)

    @rule()
    def release_all(self) -> None:
        for block in self.held.values():
            self.ring.release(block)
        self.held.clear()
        self.owners = [None] * UNITS
        assert self.ring.largest_gap() == CAPACITY

    @invariant()
    def figures_agree_with_the_model(self) -> None:
        assert len(self.ring) == len(self.held)
        assert self.ring.largest_gap() == self.model_gap()


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRingMachine = RingMachine.TestCase


def _claim(ring: Ring, nbytes: int) -> Block:
    block = ring.claim(nbytes)
    assert block is not None
    return block


def test_claims_are_rounded_up_to_the_alignment() -> None:
    """A block's size is the request rounded up to 64 bytes, so that the next block is aligned too."""
    ring = Ring(1024)
    blocks = [_claim(ring, nbytes) for nbytes in (1, 64, 65)]
    assert [(block.offset, block.nbytes) for block in blocks] == [(0, 64), (64, 64), (128, 128)]


def test_a_block_tells_where_it_lies() -> None:
    """In errors and debuggers: its figures, not its neighbours'."""
    ring = Ring(1024)
    _claim(ring, 64)
    assert repr(_claim(ring, 65)) == "Block(offset=64, nbytes=128)"


def test_next_fit_continues_at_the_cursor() -> None:
    """A gap behind the cursor is not taken while there is room ahead."""
    ring = Ring(256)
    first, _second = _claim(ring, 64), _claim(ring, 64)
    ring.release(first)
    assert _claim(ring, 64).offset == 128


def test_a_claim_wraps_at_the_end() -> None:
    """When what is ahead of the cursor is too small, the claim goes on at the start."""
    ring = Ring(256)
    first, _second = _claim(ring, 128), _claim(ring, 64)
    ring.release(first)
    assert _claim(ring, 128).offset == 0


def test_no_block_crosses_the_end() -> None:
    """Two gaps on either side of the end are not joined: a block is one contiguous range."""
    ring = Ring(256)
    first, middle, last = _claim(ring, 64), _claim(ring, 128), _claim(ring, 64)
    ring.release(first)
    ring.release(last)
    assert ring.claim(128) is None
    ring.release(middle)
    assert _claim(ring, 256).offset == 0


def test_a_long_held_block_is_stepped_over() -> None:
    """One block that is never released doesn't stall first-in-first-out use of the rest, lap after lap."""
    ring = Ring(4 * 64)
    first, stuck = _claim(ring, 64), _claim(ring, 64)
    in_flight = [_claim(ring, 64)]
    ring.release(first)
    offsets = []
    for _ in range(12):
        in_flight.append(_claim(ring, 64))
        offsets.append(in_flight[-1].offset)
        ring.release(in_flight.pop(0))
    assert set(offsets) == {0, 128, 192}
    assert stuck.offset not in offsets


def test_a_block_given_straight_back_is_taken_again() -> None:
    """With a block held elsewhere too, one claim at a time stays on the same warm bytes."""
    ring = Ring(4 * 64)
    _claim(ring, 64)
    for _ in range(5):
        block = _claim(ring, 64)
        assert block.offset == 64
        ring.release(block)


def test_the_cursor_returns_to_the_start_when_nothing_is_held() -> None:
    """Light use stays on the first, warm pages."""
    ring = Ring(1024)
    for _ in range(50):
        blocks = [_claim(ring, 100), _claim(ring, 30)]
        assert [block.offset for block in blocks] == [0, 128]
        for block in blocks:
            ring.release(block)


def test_gaps_join_in_every_order_of_release() -> None:
    """Whichever neighbour goes first, three released blocks are one gap of the full capacity."""
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        ring = Ring(192)
        blocks = [_claim(ring, 64) for _ in range(3)]
        assert ring.largest_gap() == 0
        for index in order:
            ring.release(blocks[index])
        assert ring.largest_gap() == 192
        assert len(ring) == 0


def test_an_exact_fit_is_claimed() -> None:
    """The last gap can be filled to its last byte; after that a claim fails with None."""
    ring = Ring(192)
    _claim(ring, 64)
    assert _claim(ring, 128).offset == 64
    assert ring.claim(1) is None


def test_a_claim_beyond_the_capacity_fails_and_changes_nothing() -> None:
    """A failed claim takes nothing."""
    ring = Ring(128)
    assert ring.claim(129) is None
    assert len(ring) == 0
    assert _claim(ring, 128).offset == 0


@pytest.mark.parametrize("nbytes", [0, -1, -64])
def test_a_claim_of_nothing_is_refused(nbytes: int) -> None:
    """A block needs at least one byte; the message says how many were asked for."""
    with pytest.raises(ValueError, match=f"at least one byte, not {nbytes}"):
        Ring(128).claim(nbytes)


@pytest.mark.parametrize("capacity", [0, -64, 63, 100])
def test_a_bad_capacity_is_refused(capacity: int) -> None:
    """The capacity is a positive multiple of the alignment."""
    with pytest.raises(ValueError, match=f"capacity {capacity} is not a positive multiple of 64"):
        Ring(capacity)


def test_a_double_release_is_refused() -> None:
    """Releasing twice is an error, also when the same bytes are held by a later block."""
    ring = Ring(64)
    stale = _claim(ring, 64)
    ring.release(stale)
    with pytest.raises(ValueError, match="offset 0 is not held"):
        ring.release(stale)
    _claim(ring, 64)
    with pytest.raises(ValueError, match="offset 0 is not held"):
        ring.release(stale)
    assert len(ring) == 1


def test_a_foreign_release_is_refused() -> None:
    """A block that this ring never gave out is not accepted."""
    ring = Ring(128)
    _claim(ring, 64)
    with pytest.raises(ValueError, match="offset 64 is not held"):
        ring.release(Block(64, 64))
    assert len(ring) == 1
