"""A read that is interrupted loses no message: the next one returns it."""

from __future__ import annotations

import ctypes
import functools
import operator
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


def _read_while(pair: RingPair, handler: Callable[[], object]) -> bytes | None:
    """Side B's next message; a signal that this runs for comes as the read begins, before any other Python code."""
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: handler())
    try:
        raise_it = functools.partial(ctypes.CDLL(None)["raise"], int(signal.SIGUSR1))
        received: bytes | None = list(map(operator.methodcaller("__call__"), (raise_it, pair.b.read)))[1]
        return received
    finally:
        signal.signal(signal.SIGUSR1, before)


def _interrupt() -> None:
    raise Interrupted


def _fill(pair: RingPair) -> None:
    assert pair.a.write(b"first")
    assert pair.a.write(b"second")
    pair.a.want_room(True)


@pytest.mark.parametrize("times", [1, 3])
def test_a_handler_that_raises_loses_no_message(rings: RingPair, times: int) -> None:
    """The message is still there, however often that happens."""
    _fill(rings)
    rings.a.end()
    for _ in range(times):
        with pytest.raises(Interrupted):
            _read_while(rings, _interrupt)
        assert rings.b.readable()
        assert rings.b.wait_readable(0.0)
        assert not rings.b.ended()
    assert _rest(rings) == [b"first", b"second"]
    assert rings.a.take_post()
    assert rings.b.ended()


def test_the_last_message_of_an_ended_peer_is_kept_too(rings: RingPair) -> None:
    """Nothing else is in the ring: it is readable all the same, and has not ended."""
    assert rings.a.write(b"last")
    rings.a.end()
    with pytest.raises(Interrupted):
        _read_while(rings, _interrupt)
    assert rings.b.readable()
    assert rings.b.wait_readable(0.0)
    assert not rings.b.ended()
    assert _rest(rings) == [b"last"]
    assert rings.b.ended()


def test_a_handler_may_read(rings: RingPair) -> None:
    """It gets the first message, and the outer read the next one; an error in it loses neither."""
    inner: list[bytes | None] = []

    def read() -> None:
        inner.append(rings.b.read())
        if len(inner) == 2:
            raise Interrupted

    _fill(rings)
    assert _read_while(rings, read) == b"second"
    assert inner == [b"first"]
    assert rings.a.write(b"third")
    with pytest.raises(Interrupted):
        _read_while(rings, read)
    assert inner == [b"first", b"third"]
    assert rings.b.read() is None


def test_a_look_ends_where_a_handler_has_left_a_message(rings: RingPair) -> None:
    """Its read was interrupted, so that nothing new comes: the message is there all the same."""

    def read(_number: int, _frame: object) -> None:
        assert rings.a.write(b"left")
        with pytest.raises(Interrupted):
            _read_while(rings, _interrupt)

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
        assert pair.a.take_post(), interruption.where
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
