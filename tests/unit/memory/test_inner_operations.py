"""Allocator and message ring stay whole when a handler or finalizer uses them in the middle of their own methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shmtransport.core import allocator, message_ring, python_twin
from shmtransport.core.allocator import Block, NextFitAllocator
from shmtransport.core.layout import BLOCK_ALIGNMENT
from tests.support.interruptions import interruptions
from tests.support.rings import RingPair, record_bytes

# --- claims and releases ----------------------------------------------------------------------------------------------

UNITS = 12


class Area:
    """A ring of 12 units with some of them held, and who holds what."""

    def __init__(self, sizes: tuple[int, ...], released: tuple[int, ...]) -> None:
        self.ring = NextFitAllocator(UNITS * BLOCK_ALIGNMENT)
        self.held: list[Block] = []
        for size in sizes:
            assert self.claim(size)
        for index in sorted(released, reverse=True):
            self.release(index)

    def claim(self, units: int) -> bool:
        block = self.ring.claim(units * BLOCK_ALIGNMENT)
        if block is not None:
            assert block.nbytes == units * BLOCK_ALIGNMENT
            self.held.append(block)
        return block is not None

    def release(self, index: int) -> None:
        self.ring.release(self.held.pop(index))

    def check(self) -> None:
        """No unit is held twice; all others can be claimed; and when all is released there is one gap."""
        assert len(self.ring) == len(self.held)
        units = self.units()
        assert self.ring.largest_gap() == BLOCK_ALIGNMENT * self.largest_gap()
        for _ in range(UNITS - len(units)):
            assert self.claim(1)
        assert not self.claim(1)
        assert self.units() == list(range(UNITS))
        while self.held:
            self.release(len(self.held) // 2)
        assert self.ring.largest_gap() == self.ring.capacity
        assert self.claim(UNITS)

    def units(self) -> list[int]:
        """The units that are held, in order."""
        units = sorted(
            unit
            for block in self.held
            for unit in range(block.offset // BLOCK_ALIGNMENT, (block.offset + block.nbytes) // BLOCK_ALIGNMENT)
        )
        assert len(set(units)) == len(units), "blocks overlap"
        return units

    def largest_gap(self) -> int:
        taken = set(self.units())
        return max(map(len, "".join("x" if unit in taken else " " for unit in range(UNITS)).split("x")))


AREAS = {
    "empty": ((), ()),
    "one block": ((2,), ()),
    "gaps": ((2, 1, 3, 1, 2), (0, 2, 4)),
    "cursor at the end": ((2, 1, 3, 1, 2, 3), (0, 2)),
    "full": ((3, 3, 3, 3), ()),
}


def _claim(area: Area) -> None:
    area.claim(2)


def _claim_and_release(area: Area) -> None:
    if area.claim(2):
        area.release(-1)


def _claim_all_units(area: Area) -> None:
    while area.claim(1):
        pass


def _release_first(area: Area) -> None:
    if area.held:
        area.release(0)


def _release_all(area: Area) -> None:
    while area.held:
        area.release(-1)


INNER = [_claim, _claim_and_release, _claim_all_units, _release_first, _release_all]


@pytest.fixture(params=INNER, ids=lambda inner: inner.__name__.strip("_"))
def inner(request: pytest.FixtureRequest) -> Callable[[Area], None]:
    done: Callable[[Area], None] = request.param
    return done


@pytest.mark.parametrize("state", AREAS)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_a_claim_stays_whole_whatever_is_done_within(state: str, units: int, inner: Callable[[Area], None]) -> None:
    """At each place: nothing overlaps or gets lost, and it fails only if there was no room before or after that."""
    for interruption in interruptions(allocator):
        area = Area(*AREAS[state])
        had_room = area.largest_gap() >= units
        block = interruption.during(
            lambda area=area: area.ring.claim(units * BLOCK_ALIGNMENT),  # type: ignore[misc]
            lambda area=area: inner(area),  # type: ignore[misc]
        )
        if block is None:
            assert not had_room or area.largest_gap() < units, interruption.where
        else:
            area.held.append(block)
        area.check()


@pytest.mark.parametrize("state", [state for state, (sizes, _) in AREAS.items() if sizes])
def test_a_release_stays_whole_whatever_is_done_within(state: str, inner: Callable[[Area], None]) -> None:
    """At each place, and for each of the blocks."""
    for index in range(len(Area(*AREAS[state]).held)):
        for interruption in interruptions(allocator):
            area = Area(*AREAS[state])
            block = area.held.pop(index)
            interruption.during(
                lambda area=area, block=block: area.ring.release(block),  # type: ignore[misc]
                lambda area=area: inner(area),  # type: ignore[misc]
            )
            area.check()


# --- messages ---------------------------------------------------------------------------------------------------------

LARGEST = 124  # four messages of ``SIZE`` fit
SIZE = 60


@pytest.fixture(params=range(0, 2 * record_bytes(LARGEST), 24))
def rings(request: pytest.FixtureRequest) -> Iterator[Callable[[], RingPair]]:
    """Make pairs that have come to some position, so that the next messages wrap or don't."""
    made: list[RingPair] = []

    def make() -> RingPair:
        while made:
            made.pop().close()
        pair = RingPair(LARGEST, python_twin)
        for _ in range(request.param // 8):
            assert pair.a.write(b"1234")
            assert pair.b.read() == b"1234"
        made.append(pair)
        return pair

    yield make
    while made:
        made.pop().close()


def _message(number: int) -> bytes:
    return bytes([number]) * SIZE


def _rest(pair: RingPair) -> list[bytes]:
    found = []
    while (message := pair.b.read()) is not None:
        found.append(message)
    return found


def test_a_write_stays_whole_whatever_is_written_within(rings: Callable[[], RingPair]) -> None:
    """At each place: the inner messages arrive once and in order, the outer one before, between or after them."""
    for interruption in interruptions(message_ring):
        pair = rings()
        assert pair.a.write(_message(1))

        def write_two(pair: RingPair = pair) -> None:
            assert pair.a.write(_message(3))
            assert pair.a.write(b"")

        assert interruption.during(lambda pair=pair: pair.a.write(_message(2)), write_two)  # type: ignore[misc]
        if not interruption.where:
            write_two()
        found = _rest(pair)
        assert found[0] == _message(1)
        assert found.count(_message(2)) == 1, interruption.where
        found.remove(_message(2))
        assert found == [_message(1), _message(3), b""], interruption.where


def test_a_write_for_which_an_inner_one_has_left_no_room_fails_whole(rings: Callable[[], RingPair]) -> None:
    """It says that there is none; what was written before and within arrives."""
    for interruption in interruptions(message_ring):
        pair = rings()
        for number in (1, 2, 3):
            assert pair.a.write(_message(number))
        inner: list[bool] = []
        outer = interruption.during(
            lambda pair=pair: pair.a.write(_message(4)),  # type: ignore[misc]
            lambda pair=pair, inner=inner: inner.append(pair.a.write(_message(5))),  # type: ignore[misc]
        )
        if interruption.where:
            assert [outer, *inner] in ([True, False], [False, True]), interruption.where
        assert _rest(pair) == [*map(_message, (1, 2, 3)), _message(4 if outer else 5)]


def test_a_read_stays_whole_whatever_is_read_and_written_within(rings: Callable[[], RingPair]) -> None:
    """At each place: every message is read once, the inner reads in order, and the room is given back."""
    for interruption in interruptions(message_ring):
        pair = rings()
        for number in (1, 2, 3):
            assert pair.a.write(_message(number))
        inner: list[bytes | None] = []

        def read_two_and_write_one(pair: RingPair = pair, inner: list[bytes | None] = inner) -> None:
            inner.extend((pair.b.read(), pair.b.read()))
            assert pair.a.write(_message(4))
            assert pair.b.write(b"back")

        outer = interruption.during(pair.b.read, read_two_and_write_one)
        numbers = [0 if message is None else message[0] for message in (outer, *inner)]
        if interruption.where:
            assert numbers in ([3, 1, 2], [1, 2, 3]), interruption.where
            assert _rest(pair) == [_message(4)]
            assert pair.a.read() == b"back"
        for number in range(4 if interruption.where else 2):
            assert pair.a.write(_message(number))
        assert pair.b.read() == _message(0 if interruption.where else 2)


def test_a_read_of_a_message_that_an_inner_one_has_taken_finds_none(rings: Callable[[], RingPair]) -> None:
    """It is read once."""
    for interruption in interruptions(message_ring):
        pair = rings()
        assert pair.a.write(_message(1))
        inner: list[bytes | None] = []
        outer = interruption.during(
            pair.b.read,
            lambda pair=pair, inner=inner: inner.append(pair.b.read()),  # type: ignore[misc]
        )
        assert [outer, *inner].count(_message(1)) == 1, interruption.where
        assert _rest(pair) == []
