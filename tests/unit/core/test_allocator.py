"""The ring: claims never overlap, fail only for want of a gap, and follow next-fit."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmtransport.core import python_twin
from shmtransport.core.layout import BLOCK_ALIGNMENT, round_up
from tests.support.cores import native_twin, needs_native

UNITS = 32
CAPACITY = UNITS * BLOCK_ALIGNMENT


class RingMachine(RuleBasedStateMachine):
    """Claims and releases against a model: one owner for every 64-byte unit of the area."""

    core: ClassVar[Any] = python_twin

    def __init__(self) -> None:
        super().__init__()
        self.allocator = self.core.NextFitAllocator(CAPACITY)
        self.owners: list[int | None] = [None] * UNITS
        self.held: dict[int, Any] = {}
        self.last_position = -1

    def model_gap(self) -> int:
        """Bytes in the longest run of units without an owner."""
        runs = "".join(" " if owner is None else "x" for owner in self.owners).split("x")
        return max(map(len, runs)) * BLOCK_ALIGNMENT

    @rule(nbytes=st.one_of(st.integers(1, CAPACITY // 4), st.integers(1, CAPACITY + 65)))
    def claim(self, nbytes: int) -> None:
        gap = self.model_gap()
        block = self.allocator.claim(nbytes)
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
        self.allocator.release(block)
        self.owners = [None if owner == offset else owner for owner in self.owners]
        with pytest.raises(ValueError, match="is not held"):
            self.allocator.release(block)

    @rule()
    def release_all(self) -> None:
        for block in self.held.values():
            self.allocator.release(block)
        self.held.clear()
        self.owners = [None] * UNITS
        assert self.allocator.largest_gap() == CAPACITY

    @invariant()
    def figures_agree_with_the_model(self) -> None:
        assert len(self.allocator) == len(self.held)
        gap = self.model_gap()
        assert self.allocator.largest_gap() == gap
        assert self.allocator.has_room(gap + 1) is False
        assert gap == 0 or self.allocator.has_room(gap)


class NativeRingMachine(RingMachine):
    """The same against the compiled twin."""

    core = native_twin


for machine in (RingMachine, NativeRingMachine):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestRingMachine = RingMachine.TestCase
TestNativeRingMachine = needs_native(NativeRingMachine.TestCase)


def _claim(allocator: Any, nbytes: int) -> Any:
    block = allocator.claim(nbytes)
    assert block is not None
    return block


def test_claims_are_rounded_up_to_the_alignment(core: ModuleType) -> None:
    """A block's size is the request rounded up to 64 bytes, so that the next block is aligned too."""
    allocator = core.NextFitAllocator(1024)
    blocks = [_claim(allocator, nbytes) for nbytes in (1, 64, 65)]
    assert [(block.offset, block.nbytes) for block in blocks] == [(0, 64), (64, 64), (128, 128)]


def test_a_block_tells_where_it_lies(core: ModuleType) -> None:
    """In errors and debuggers: its figures, not its neighbours'."""
    allocator = core.NextFitAllocator(1024)
    _held = _claim(allocator, 64)
    assert repr(_claim(allocator, 65)) == "Block(offset=64, nbytes=128)"


def test_next_fit_continues_at_the_cursor(core: ModuleType) -> None:
    """A gap behind the cursor is not taken while there is room ahead."""
    allocator = core.NextFitAllocator(256)
    first, _second = _claim(allocator, 64), _claim(allocator, 64)
    allocator.release(first)
    assert _claim(allocator, 64).offset == 128


def test_a_claim_wraps_at_the_end(core: ModuleType) -> None:
    """When what is ahead of the cursor is too small, the claim goes on at the start."""
    allocator = core.NextFitAllocator(256)
    first, _second = _claim(allocator, 128), _claim(allocator, 64)
    allocator.release(first)
    assert _claim(allocator, 128).offset == 0


def test_no_block_crosses_the_end(core: ModuleType) -> None:
    """Two gaps on either side of the end are not joined: a block is one contiguous range."""
    allocator = core.NextFitAllocator(256)
    first, middle, last = _claim(allocator, 64), _claim(allocator, 128), _claim(allocator, 64)
    allocator.release(first)
    allocator.release(last)
    assert allocator.claim(128) is None
    allocator.release(middle)
    assert _claim(allocator, 256).offset == 0


def test_a_long_held_block_is_stepped_over(core: ModuleType) -> None:
    """One block that is never released doesn't stall first-in-first-out use of the rest, lap after lap."""
    allocator = core.NextFitAllocator(4 * 64)
    first, stuck = _claim(allocator, 64), _claim(allocator, 64)
    in_flight = [_claim(allocator, 64)]
    allocator.release(first)
    offsets = []
    for _ in range(12):
        in_flight.append(_claim(allocator, 64))
        offsets.append(in_flight[-1].offset)
        allocator.release(in_flight.pop(0))
    assert set(offsets) == {0, 128, 192}
    assert stuck.offset not in offsets


def test_a_block_given_straight_back_is_taken_again(core: ModuleType) -> None:
    """With a block held elsewhere too, one claim at a time stays on the same warm bytes."""
    allocator = core.NextFitAllocator(4 * 64)
    _held = _claim(allocator, 64)
    for _ in range(5):
        block = _claim(allocator, 64)
        assert block.offset == 64
        allocator.release(block)


def test_the_cursor_returns_to_the_start_when_nothing_is_held(core: ModuleType) -> None:
    """Light use stays on the first, warm pages."""
    allocator = core.NextFitAllocator(1024)
    for _ in range(50):
        blocks = [_claim(allocator, 100), _claim(allocator, 30)]
        assert [block.offset for block in blocks] == [0, 128]
        for block in blocks:
            allocator.release(block)


def test_gaps_join_in_every_order_of_release(core: ModuleType) -> None:
    """Whichever neighbour goes first, three released blocks are one gap of the full capacity."""
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        allocator = core.NextFitAllocator(192)
        blocks = [_claim(allocator, 64) for _ in range(3)]
        assert allocator.largest_gap() == 0
        for index in order:
            allocator.release(blocks[index])
        assert allocator.largest_gap() == 192
        assert len(allocator) == 0


def test_an_exact_fit_is_claimed(core: ModuleType) -> None:
    """The last gap can be filled to its last byte; after that a claim fails with None."""
    allocator = core.NextFitAllocator(192)
    _held = _claim(allocator, 64)
    last = _claim(allocator, 128)
    assert last.offset == 64
    assert allocator.claim(1) is None


def test_a_claim_beyond_the_capacity_fails_and_changes_nothing(core: ModuleType) -> None:
    """A failed claim takes nothing."""
    allocator = core.NextFitAllocator(128)
    assert allocator.claim(129) is None
    assert len(allocator) == 0
    assert _claim(allocator, 128).offset == 0


@pytest.mark.parametrize("nbytes", [0, -1, -64])
def test_a_claim_of_nothing_is_refused(core: ModuleType, nbytes: int) -> None:
    """A block needs at least one byte; the message says how many were asked for."""
    with pytest.raises(ValueError, match=f"at least one byte, not {nbytes}"):
        core.NextFitAllocator(128).claim(nbytes)


@pytest.mark.parametrize("capacity", [0, -64, 63, 100])
def test_a_bad_capacity_is_refused(core: ModuleType, capacity: int) -> None:
    """The capacity is a positive multiple of the alignment."""
    with pytest.raises(ValueError, match=f"capacity {capacity} is not a positive multiple of 64"):
        core.NextFitAllocator(capacity)


def test_a_double_release_is_refused(core: ModuleType) -> None:
    """Releasing twice is an error, also when the same bytes are held by a later block."""
    allocator = core.NextFitAllocator(64)
    stale = _claim(allocator, 64)
    allocator.release(stale)
    with pytest.raises(ValueError, match="offset 0 is not held"):
        allocator.release(stale)
    _held = _claim(allocator, 64)
    with pytest.raises(ValueError, match="offset 0 is not held"):
        allocator.release(stale)
    assert len(allocator) == 1


def test_a_foreign_release_is_refused(core: ModuleType) -> None:
    """A block that this ring never gave out is not accepted."""
    allocator = core.NextFitAllocator(128)
    _held = _claim(allocator, 64)
    with pytest.raises(ValueError, match="offset 64 is not held"):
        allocator.release(core.Block(64, 64))
    assert len(allocator) == 1


def test_a_block_of_another_allocator_is_refused(core: ModuleType) -> None:
    """Each allocator knows its own: figures of one never change another, and the block stays held where it is."""
    one, other = core.NextFitAllocator(128), core.NextFitAllocator(128)
    block = _claim(one, 64)
    with pytest.raises(ValueError, match="offset 0 is not held"):
        other.release(block)
    assert block.held
    assert (len(one), len(other)) == (1, 0)
    one.release(block)
    assert not block.held


def test_a_block_outlives_its_allocator(core: ModuleType) -> None:
    """It keeps its figures, and stays held."""
    last = _claim(core.NextFitAllocator(128), 100)
    assert (last.offset, last.nbytes, last.held) == (0, 128, True)


@needs_native
def test_a_block_that_is_lost_is_given_back() -> None:
    """An interrupt may come after the compiled claim has returned its block and before the caller has stored it."""
    allocator = native_twin.NextFitAllocator(128)  # type: ignore[union-attr]
    kept = _claim(allocator, 64)
    _claim(allocator, 64)
    assert len(allocator) == 1
    assert _claim(allocator, 64).offset == 64
    allocator.release(kept)
    assert allocator.largest_gap() == 128


@pytest.mark.parametrize("nbytes", [2**63 - 1, 2**63, 2**70])
def test_a_claim_beyond_64_bits_finds_no_gap(core: ModuleType, nbytes: int) -> None:
    """It is a claim like any other that is too large."""
    assert core.NextFitAllocator(2**62).claim(nbytes) is None
    with pytest.raises(ValueError, match="at least one byte"):
        core.NextFitAllocator(2**62).claim(-nbytes)
