"""Both twins, driven by the same operations: the same results, the same bytes, the same errors; malformed input too."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmtransport.core import python_twin
from shmtransport.core.layout import BLOCK_ALIGNMENT
from tests.support.cores import native_twin, needs_native
from tests.support.rings import CONSUMED, ENDED, PUBLISHED, WANTS_ROOM, Forger, RingPair

_UNITS = 24
_CAPACITY = _UNITS * BLOCK_ALIGNMENT


def outcome(act: Callable[[], Any]) -> Any:
    """What comes of something: its result, or its error's class and text."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001 - the twins are to fail alike, whatever it is
        return type(error), str(error)


# --- allocator --------------------------------------------------------------------------------------------------------


class Allocators(RuleBasedStateMachine):
    """Claims and releases in any order, valid or not."""

    def __init__(self) -> None:
        super().__init__()
        self.allocators = [twin.NextFitAllocator(_CAPACITY) for twin in _twins()]
        self.held: list[list[Any]] = []
        self.released: list[list[Any]] = []

    @rule(nbytes=st.one_of(st.integers(1, _CAPACITY // 3), st.integers(-1, _CAPACITY + 65), st.just(2**64)))
    def claim(self, nbytes: int) -> None:
        blocks = [outcome(lambda allocator=allocator: allocator.claim(nbytes)) for allocator in self.allocators]
        if nbytes <= 0 or blocks[0] is None:
            assert blocks[1] == blocks[0]
            return
        assert (blocks[1].offset, blocks[1].nbytes) == (blocks[0].offset, blocks[0].nbytes)
        assert repr(blocks[1]) == repr(blocks[0])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 2**16))
    def release(self, index: int) -> None:
        blocks = self.held.pop(index % len(self.held))
        for allocator, block in zip(self.allocators, blocks, strict=True):
            allocator.release(block)
        self.released.append(blocks)

    @precondition(lambda self: self.released)
    @rule(index=st.integers(0, 2**16))
    def release_again(self, index: int) -> None:
        blocks = self.released[index % len(self.released)]
        kinds = [
            outcome(lambda allocator=allocator, block=block: allocator.release(block))[0]
            for allocator, block in zip(self.allocators, blocks, strict=True)
        ]
        assert kinds == [ValueError, ValueError]

    @invariant()
    def figures_agree(self) -> None:
        one, other = self.allocators
        assert len(other) == len(one)
        gap = one.largest_gap()
        assert other.largest_gap() == gap
        assert [other.has_room(n) for n in (gap, gap + 1, 2**63)] == [one.has_room(n) for n in (gap, gap + 1, 2**63)]
        assert all(block.held for blocks in self.held for block in blocks)
        assert not any(block.held for blocks in self.released for block in blocks)


# --- message ring -----------------------------------------------------------------------------------------------------

_LARGEST = 60
_RECORDS = 128
_SIZE = st.one_of(st.sampled_from([0, 1, 4, 5, 59, 60]), st.integers(0, 70))
_FORGED = st.one_of(st.integers(0, 4 * _RECORDS), st.integers(0, 2**64 - 1))
_MOVED = st.one_of(st.integers(-3, 17).map(lambda steps: 8 * steps), st.integers(-24, 140))
_SIDE = st.integers(0, 1)


class Rings(RuleBasedStateMachine):
    """Both sides write, read, wait and lie in any order; one pair of each twin, and the two mixed pairs."""

    def __init__(self) -> None:
        super().__init__()
        python, native = _twins()
        cores = ((python, python), (native, native), (python, native), (native, python))
        self.pairs = [RingPair(_LARGEST, *each) for each in cores]
        self.written = 0

    def teardown(self) -> None:
        for pair in self.pairs:
            pair.close()

    def do(self, side: int, act: Callable[[Any], Any]) -> None:
        """The same on one side of each pair."""
        outcomes = [outcome(lambda pair=pair: act((pair.a, pair.b)[side])) for pair in self.pairs]
        assert all(each == outcomes[0] for each in outcomes), outcomes
        assert all(type(each) is type(outcomes[0]) for each in outcomes), outcomes

    def forge(self, side: int, act: Callable[[Forger], None]) -> None:
        """The same lie in one side's segment of each pair."""
        for pair in self.pairs:
            act(Forger((pair.segment_a, pair.segment_b)[side], _RECORDS))

    @rule(side=_SIDE, size=_SIZE)
    def write(self, side: int, size: int) -> None:
        self.written += 1
        message = bytes((self.written + index) % 256 for index in range(size))
        self.do(side, lambda ring: ring.write(message))

    @rule(side=_SIDE)
    def read(self, side: int) -> None:
        self.do(side, lambda ring: ring.read())

    @rule(side=_SIDE, wanted=st.booleans())
    def want_room(self, side: int, wanted: bool) -> None:
        self.do(side, lambda ring: ring.want_room(wanted))

    @rule(side=_SIDE)
    def end(self, side: int) -> None:
        self.do(side, lambda ring: ring.end())

    @rule(side=_SIDE, cell=st.sampled_from([PUBLISHED, CONSUMED, WANTS_ROOM, ENDED]), value=_FORGED)
    def forge_a_cell(self, side: int, cell: int, value: int) -> None:
        self.forge(side, lambda forger: forger.set_cell(cell, value))

    @rule(side=_SIDE, by=_MOVED, size=_SIZE)
    def lie_about_a_position_for_once(self, side: int, by: int, size: int) -> None:
        """The other side reads, or writes until it looks for room; then the truth stands there again."""
        for cell in (PUBLISHED, CONSUMED):
            truth: list[int] = []

            def move(forger: Forger, cell: int = cell, truth: list[int] = truth) -> None:
                truth.append(forger.cell(cell))
                forger.set_cell(cell, (truth[-1] + by) % 2**64)

            self.forge(side, move)
            for _ in range(3):
                self.do(
                    1 - side, (lambda ring: ring.read()) if cell == PUBLISHED else lambda ring: ring.write(b"x" * size)
                )
            self.forge(side, lambda forger, cell=cell, truth=truth: forger.set_cell(cell, truth.pop(0)))  # type: ignore[misc]

    @rule(side=_SIDE, at=st.integers(0, 15), length=st.one_of(st.integers(0, 140), st.integers(0, 2**32 - 1)))
    def forge_a_length(self, side: int, at: int, length: int) -> None:
        self.forge(side, lambda forger: forger.set_length(8 * at, length))

    @invariant()
    def all_know_the_same(self) -> None:
        for side in (0, 1):
            self.do(side, lambda ring: (ring.readable(), ring.ended(), ring.wait_readable(0.0), ring.largest_message))

    @invariant()
    def all_memory_is_the_same(self) -> None:
        for name in ("segment_a", "segment_b"):
            memories = {bytes(getattr(pair, name).message_ring) for pair in self.pairs}
            assert len(memories) == 1


def _twins() -> tuple[ModuleType, ModuleType]:
    assert native_twin is not None
    return python_twin, native_twin


for machine in (Allocators, Rings):
    machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAllocators = needs_native(Allocators.TestCase)
TestRings = needs_native(Rings.TestCase)
