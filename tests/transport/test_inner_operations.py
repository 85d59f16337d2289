"""What a signal handler or a finalizer finds in the middle of an operation of its own thread: every structure whole.

CPython runs them where something is called. So here an inner operation is made at each call that an outer one makes or
returns from, at one after another, and then both must have done what they do by themselves.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from shmtransport import message_ring, ring
from shmtransport.ring import Ring
from shmtransport.turns import Turns, _Turn

from .rings import RingPair

CAPACITY = 1024


def at_each_call(module_file: str, make: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]) -> Iterator[None]:
    """Run an outer operation of new ones, with the inner one at its first call, then at its second, and so on."""
    at = 0
    while True:
        outer, inner = make()
        seen = 0

        def profile(frame: FrameType, _event: str, _argument: Any) -> None:
            nonlocal seen
            if frame.f_code.co_filename != module_file:
                return
            if seen == at:  # noqa: B023 - called before the next round
                sys.setprofile(None)
                inner()  # noqa: B023
            seen += 1

        sys.setprofile(profile)
        try:
            outer()
        finally:
            sys.setprofile(None)
        yield
        if seen <= at:  # there was no such call: all have had their turn
            assert at >= 2, "the outer operation makes no calls: nothing was tried"
            return
        at += 1


class Area:
    """A ring with blocks that are held, and gaps between them."""

    def __init__(self) -> None:
        self.ring = Ring(CAPACITY)
        blocks = [self.ring.claim(nbytes) for nbytes in (64, 128, 64, 192, 64, 64)]
        self.held = [block for block in blocks if block is not None]
        for index in (3, 1):
            self.ring.release(self.held.pop(index))

    def claim(self) -> None:
        block = self.ring.claim(100)
        if block is not None:
            self.held.append(block)

    def release(self) -> None:
        if self.held:
            self.ring.release(self.held.pop())

    def check(self) -> None:
        """Blocks do not overlap, and once all are released one gap has the whole area."""
        end = 0
        for block in sorted(self.held, key=lambda block: block.offset):
            assert block.held
            assert block.offset >= end
            end = block.offset + block.nbytes
        assert end <= CAPACITY
        assert len(self.ring) == len(self.held)
        while self.held:
            self.release()
        assert self.ring.largest_gap() == CAPACITY


@pytest.mark.parametrize("outer", ["claim", "release"])
@pytest.mark.parametrize("inner", ["c", "r", "cr", "rc", "rrrrr", "rrrrrc"])
def test_a_ring_is_whole_at_every_call(outer: str, inner: str) -> None:
    """``inner`` are the inner claims and releases, in order."""
    areas: list[Area] = []

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        area = Area()
        areas.append(area)

        def interfere() -> None:
            for step in inner:
                (area.claim if step == "c" else area.release)()

        return (area.claim if outer == "claim" else area.release), interfere

    for _ in at_each_call(ring.__file__, make):
        areas.pop().check()


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_message_ring_takes_an_inner_message_at_every_call(before: int) -> None:
    """Both messages arrive, whole and once, wherever in the ring they are written."""
    pairs: list[RingPair] = []

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        pairs.append(RingPair(60))
        rings = pairs[-1]
        for _ in range(before):  # so that records are written in other places, around the end too
            assert rings.a.write(b"x" * 30)
            assert rings.b.read() == b"x" * 30
        return (lambda: rings.a.write(b"outer" * 3)), (lambda: rings.a.write(b"inner" * 4))

    for _ in at_each_call(message_ring.__file__, make):
        found = [pairs[-1].b.read() for _ in range(3)]
        assert set(found) - {None} <= {b"outer" * 3, b"inner" * 4}
        assert found.count(b"outer" * 3) == 1
        assert found.count(b"inner" * 4) <= 1
        pairs.pop().close()


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_message_ring_gives_each_message_once_at_every_call(before: int) -> None:
    """An inner reading takes what the outer one was about to take, which then takes the next."""
    pairs: list[RingPair] = []
    found: list[bytes | None] = []

    def make() -> tuple[Callable[[], Any], Callable[[], Any]]:
        pairs.append(RingPair(60))
        rings = pairs[-1]
        found.clear()
        for _ in range(before):
            assert rings.a.write(b"x" * 30)
            assert rings.b.read() == b"x" * 30
        assert rings.a.write(b"first" * 3)
        assert rings.a.write(b"second" * 3)

        def read() -> None:
            found.append(rings.b.read())

        return read, read

    for _ in at_each_call(message_ring.__file__, make):
        found.append(pairs[-1].b.read())
        assert sorted(one for one in found if one is not None) == [b"first" * 3, b"second" * 3]
        assert pairs[-1].a.write(b"y" * 60), "the room of both is free again"
        pairs.pop().close()


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_turn_that_was_called_before_it_is_waited_for_has_come() -> None:
    """An inner call may come between: what it calls is not lost."""
    turns = Turns()
    with turns.lock:
        turns._followers["mine"] = _Turn()
        assert not turns.call("mine")
        turns.follow("mine", 10.0)
    assert not turns._followers


def test_an_inner_call_receives_in_the_place_of_its_outer_one() -> None:
    """For its own thread the receiver's place is free; for another it is taken."""
    turns = Turns()
    seen: list[bool] = []

    def wait(_timeout_s: float) -> None:
        with turns.lock:
            seen.append(turns.taken())
            turns.receive("inner", lambda _timeout_s: seen.append(turns.received_for == ["outer", "inner"]), 0.0)

        def look() -> None:
            with turns.lock:
                seen.append(turns.taken())

        in_thread(look).join(10.0)

    with turns.lock:
        turns.receive("outer", wait, 0.0)
        assert not turns.received_for
    assert seen == [False, True, True]


def test_who_has_followed_longest_takes_over_by_its_innermost_call() -> None:
    """An outer call of that thread can't go on before the inner one has returned."""
    turns = Turns()
    inner_waits, woken = threading.Event(), []

    def inner() -> None:
        with turns.lock:
            inner_waits.set()
            turns.follow("inner", 10.0)
            woken.append("inner")

    def outer() -> None:
        with turns.lock:
            turns._followers["outer"] = _Turn()
            inner()
            del turns._followers["outer"]

    first = in_thread(outer)
    assert inner_waits.wait(10.0)
    with turns.lock:
        turns.hand_over()
    first.join(10.0)
    assert woken == ["inner"]


def test_the_receiver_is_waited_for_by_other_threads_alone() -> None:
    """Who waits for it goes on when it has left; its own thread would wait for itself."""
    turns = Turns()
    may_leave, left = threading.Event(), threading.Event()

    def receive() -> None:
        with turns.lock:
            turns.receive("key", lambda _timeout_s: may_leave.wait(10.0), 0.0)
        left.set()

    receiver = in_thread(receive)
    while not turns.received_for:
        left.wait(0.01)
    threading.Timer(0.05, may_leave.set).start()
    with turns.lock:
        turns.wait_for_receiver()
        assert not turns.received_for
    receiver.join(10.0)
    with turns.lock:
        turns.receive("mine", lambda _timeout_s: turns.wait_for_receiver(), 0.0)
