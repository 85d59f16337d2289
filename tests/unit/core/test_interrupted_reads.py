"""A read that is interrupted loses no message: the next one returns it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from shmtransport.core import message_ring, python_twin
from tests.support.interruptions import interruptions
from tests.support.rings import RingPair

LARGEST = 60


class Interrupted(BaseException):
    """As KeyboardInterrupt, at which pytest would stop."""


@pytest.fixture
def rings(core: ModuleType) -> Iterator[RingPair]:
    made = RingPair(LARGEST, core)
    yield made
    made.close()


def _rest(pair: RingPair) -> list[bytes]:
    found = []
    while (message := pair.b.read()) is not None:
        found.append(message)
    return found


def _reader(core: ModuleType, pair: RingPair, on_room: Callable[[], object]) -> None:
    """Let side B do something else than wake its peer."""
    pair.b = core.MessageRing(pair.segment_b.message_ring, pair.segment_a.message_ring, on_room)


def _fill(pair: RingPair) -> None:
    assert pair.a.write(b"first")
    assert pair.a.write(b"second")
    pair.a.want_room(True)


@pytest.mark.parametrize("times", [1, 3])
def test_a_wake_up_that_raises_loses_no_message(core: ModuleType, rings: RingPair, times: int) -> None:
    """The message is still there, and the next read wakes the peer again, until that succeeds."""
    told: list[str] = []

    def tell() -> None:
        told.append("room")
        if len(told) <= times:
            raise Interrupted

    _reader(core, rings, tell)
    _fill(rings)
    rings.a.end()
    for _ in range(times):
        with pytest.raises(Interrupted):
            rings.b.read()
        assert rings.b.readable()
        assert rings.b.wait_readable(0.0)
        assert not rings.b.ended()
    assert _rest(rings) == [b"first", b"second"]
    assert len(told) == times + 2
    assert rings.b.ended()


def test_the_last_message_of_an_ended_peer_is_kept_too(core: ModuleType, rings: RingPair) -> None:
    """Nothing else is in the ring: it is readable all the same, and has not ended."""

    def tell() -> None:
        rings.a.want_room(False)
        raise Interrupted

    _reader(core, rings, tell)
    assert rings.a.write(b"last")
    rings.a.want_room(True)
    rings.a.end()
    with pytest.raises(Interrupted):
        rings.b.read()
    assert rings.b.readable()
    assert rings.b.wait_readable(0.0)
    assert not rings.b.ended()
    assert _rest(rings) == [b"last"]
    assert rings.b.ended()


def test_a_wake_up_may_read(core: ModuleType, rings: RingPair) -> None:
    """It gets the message that was taken, and the outer read the next one; an error in it loses neither."""
    inner: list[bytes | None] = []

    def read() -> None:
        inner.append(rings.b.read())
        if len(inner) == 2:
            raise Interrupted

    _reader(core, rings, read)
    _fill(rings)
    with pytest.raises(Interrupted):
        rings.b.read()
    assert inner == [b"first", b"second"]
    assert rings.b.read() is None
    assert rings.a.write(b"third")
    assert rings.b.read() is None
    assert inner == [b"first", b"second", b"third"]


def test_a_signal_in_the_middle_of_a_read_loses_no_message(core: ModuleType, rings: RingPair) -> None:
    """Its handler raises once the room was given back."""

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupted

    _reader(core, rings, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    _fill(rings)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            rings.b.read()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert _rest(rings) == [b"first", b"second"]
    signal.signal(signal.SIGUSR1, before)


def test_a_look_ends_where_a_handler_has_left_a_message(core: ModuleType, rings: RingPair) -> None:
    """Its read was interrupted, so that nothing new comes: the message is there all the same."""

    def tell() -> None:
        raise Interrupted

    def read(_number: int, _frame: object) -> None:
        assert rings.a.write(b"left")
        rings.a.want_room(True)
        with pytest.raises(Interrupted):
            rings.b.read()
        rings.a.want_room(False)

    _reader(core, rings, tell)
    before = signal.signal(signal.SIGALRM, read)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        started = time.perf_counter()
        assert rings.b.wait_readable(started + 20.0)
        assert time.perf_counter() < started + 15.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert _rest(rings) == [b"left"]


def test_an_interrupt_at_any_place_of_a_read_loses_no_message() -> None:
    """Wherever CPython may run a handler: each message is read once, in order, and a waiting peer is told."""
    for interruption in interruptions(message_ring):
        pair = RingPair(LARGEST, python_twin)
        _fill(pair)
        read: list[bytes] = []

        def interrupt() -> None:
            raise Interrupted

        try:
            read.append(interruption.during(pair.b.read, interrupt))  # type: ignore[arg-type]
        except Interrupted:
            assert interruption.where
        assert read + _rest(pair) == [b"first", b"second"], interruption.where
        assert pair.woken["a"] >= 2, interruption.where
        pair.close()


def test_a_read_without_memory_loses_no_message(core: ModuleType, rings: RingPair) -> None:
    """Wherever it runs out: the message is read by the next call, and its room is given back."""
    testcapi = pytest.importorskip("_testcapi")
    failed = 0
    for place in range(40):
        message = bytes([place]) * LARGEST
        assert rings.a.write(message)
        received = None
        try:
            testcapi.set_nomemory(place, place + 1)
            received = rings.b.read()
            testcapi.remove_mem_hooks()
        except (MemoryError, RuntimeError):  # without memory, no lock is made
            testcapi.remove_mem_hooks()
            failed += 1
            assert rings.b.readable()
            received = rings.b.read()
        assert received == message
        assert not rings.b.readable()
    assert failed
