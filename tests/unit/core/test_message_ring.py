"""The message ring: whole messages in order, whatever their sizes, and a writer without room always gets told."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shmtransport.core import python_twin
from shmtransport.core.message_ring import message_ring_bytes
from shmtransport.errors import MessageTooLarge
from tests.support.cores import native_twin, needs_native
from tests.support.rings import CELLS_BYTES, CONSUMED, ENDED, PUBLISHED, WANTS_ROOM, Forger, RingPair, record_bytes

LARGEST = 60  # a record of 64 bytes, two of which fill the ring


@pytest.fixture
def rings(core: ModuleType) -> Iterator[RingPair]:
    made = RingPair(LARGEST, core)
    yield made
    made.close()


def _content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


# --- against a model --------------------------------------------------------------------------------------------------


class _Direction:
    """The model of one direction: what was written and not read, and what its writer and its reader have said."""

    def __init__(self, writer: Any, reader: Any) -> None:
        self.writer = writer
        self.reader = reader
        self.unread: deque[bytes] = deque()
        self.written_bytes = 0
        self.wants_room = False
        self.ended = False

    @property
    def unread_bytes(self) -> int:
        return sum(record_bytes(len(message)) for message in self.unread)


class MessageRingMachine(RuleBasedStateMachine):
    """Writes and reads in both directions in any order, against a deque for each."""

    core: ClassVar[Any] = python_twin

    def __init__(self) -> None:
        super().__init__()
        self.pair = RingPair(LARGEST, self.core)
        self.directions = [_Direction(self.pair.a, self.pair.b), _Direction(self.pair.b, self.pair.a)]
        self.seed = 0

    def teardown(self) -> None:
        for direction in self.directions:
            while direction.unread:
                assert direction.reader.read() == direction.unread.popleft()
            assert direction.reader.read() is None
        self.pair.close()

    def write_to(self, direction: _Direction, size: int) -> bool:
        self.seed += 1
        message = _content(size, self.seed)
        room = self.pair.capacity - direction.unread_bytes
        written = direction.writer.write(message)
        assert written == (record_bytes(size) <= room), "a message is written exactly if there is room for it"
        if written:
            direction.unread.append(message)
            direction.written_bytes += record_bytes(size)
        return written

    @rule(index=st.integers(0, 1), size=st.one_of(st.sampled_from([0, 1, 4, 5, LARGEST]), st.integers(0, LARGEST)))
    def write(self, index: int, size: int) -> None:
        self.write_to(self.directions[index], size)

    @rule(index=st.integers(0, 1))
    def write_up_to_the_end(self, index: int) -> None:
        """A record whose last byte is the ring's last, if one of at most the largest size can be."""
        direction = self.directions[index]
        left = self.pair.capacity - direction.written_bytes % self.pair.capacity
        if left <= record_bytes(LARGEST):
            self.write_to(direction, left - 4)

    @rule(index=st.integers(0, 1), size=st.integers(LARGEST + 1, 4 * LARGEST))
    def write_what_never_fits(self, index: int, size: int) -> None:
        with pytest.raises(MessageTooLarge):
            self.directions[index].writer.write(bytes(size))

    @rule(index=st.integers(0, 1), size=st.integers(0, LARGEST))
    def write_or_ask_for_room(self, index: int, size: int) -> None:
        """Act as a sender that will wait: ask for room when there is none, and withdraw that once there was."""
        direction = self.directions[index]
        if self.write_to(direction, size):
            direction.writer.want_room(False)
            direction.wants_room = False
        else:
            direction.writer.want_room(True)
            direction.wants_room = True
            assert not self.write_to(direction, size)

    @rule(index=st.integers(0, 1))
    def read(self, index: int) -> None:
        direction = self.directions[index]
        expected = direction.unread.popleft() if direction.unread else None
        direction.writer.take_post()
        assert direction.reader.read() == expected
        told = direction.wants_room and expected is not None
        assert direction.writer.take_post() == told, "the writer is posted exactly if it wants room"

    @rule(index=st.integers(0, 1))
    def end(self, index: int) -> None:
        self.directions[index].writer.end()
        self.directions[index].ended = True

    @invariant()
    def the_readers_know_what_is_there(self) -> None:
        for direction in self.directions:
            assert direction.reader.readable() == bool(direction.unread)
            assert direction.reader.wait_readable(0.0) == bool(direction.unread)
            assert direction.reader.ended() == (direction.ended and not direction.unread)


class NativeMessageRingMachine(MessageRingMachine):
    """The same against the compiled twin."""

    core = native_twin


for machine in (MessageRingMachine, NativeMessageRingMachine):
    machine.TestCase.settings = settings(max_examples=80, stateful_step_count=50)
TestMessageRingMachine = MessageRingMachine.TestCase
TestNativeMessageRingMachine = needs_native(NativeMessageRingMachine.TestCase)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0, 1, 3, 4, 5, 60, 61, 1024, 65536])
def test_a_ring_takes_two_of_the_largest_messages_it_was_made_for(core: ModuleType, largest: int) -> None:
    """``message_ring_bytes`` reserves exactly that; a message too large by more than padding never fits."""
    pair = RingPair(largest, core)
    try:
        assert message_ring_bytes(largest) == CELLS_BYTES + pair.capacity
        assert largest <= pair.a.largest_message < largest + 8
        for seed in range(3):
            first, second = _content(largest, seed), _content(largest, ~seed)
            assert pair.a.write(first)
            assert pair.a.write(second)
            assert not pair.a.write(b"")
            assert [pair.b.read(), pair.b.read(), pair.b.read()] == [first, second, None]
        with pytest.raises(MessageTooLarge):
            pair.a.write(bytes(pair.a.largest_message + 1))
        assert pair.a.write(bytes(pair.a.largest_message))
    finally:
        pair.close()


def test_a_message_that_never_fits_says_what_does(rings: RingPair) -> None:
    """The error names the message's size, the ring's limit and the remedy; nothing is published."""
    with pytest.raises(MessageTooLarge, match=r"^a message of 61 bytes.*takes 60.*raise max_message_bytes"):
        rings.a.write(bytes(61))
    assert not rings.b.readable()


@pytest.mark.parametrize("size", [0, 1, 4, 11, 28, 59, 60])
def test_a_message_arrives_whole_wherever_it_wraps(rings: RingPair, size: int) -> None:
    """Every start of a record within the ring, and so every way to be cut in two by its end."""
    for start in range(0, rings.capacity, 8):
        message = _content(size, start)
        assert rings.a.write(message)
        assert rings.b.read() == message
        shift = (8 - record_bytes(size)) % rings.capacity  # so that the next one starts 8 bytes later than this
        while shift:
            step = min(shift, record_bytes(LARGEST))
            assert rings.a.write(bytes(step - 4))
            assert rings.b.read() == bytes(step - 4)
            shift -= step
    assert Forger(rings.segment_a, rings.capacity).cell(PUBLISHED) % rings.capacity == 0


def test_what_was_read_is_the_readers_own(rings: RingPair) -> None:
    """A message is copied out: what the writer does to the ring afterwards doesn't change it."""
    rings.a.write(b"as it was")
    received = rings.b.read()
    Forger(rings.segment_a, rings.capacity).set_records(b"\xff" * rings.capacity)
    assert received == b"as it was"
    assert type(received) is bytes


def test_each_side_writes_in_its_own_segment_only(rings: RingPair) -> None:
    """Positions and flags stand in the owner's cells, each in a cache line of its own, all others stay 0."""
    a, b = Forger(rings.segment_a, rings.capacity), Forger(rings.segment_b, rings.capacity)
    rings.a.write(b"12345")
    rings.a.want_room(True)
    rings.b.read()
    rings.b.end()
    assert [a.cell(index) for index in (PUBLISHED, CONSUMED, WANTS_ROOM, ENDED)] == [16, 0, 1, 0]
    assert [b.cell(index) for index in (PUBLISHED, CONSUMED, WANTS_ROOM, ENDED)] == [0, 16, 0, 1]
    rings.a.want_room(False)
    assert a.cell(WANTS_ROOM) == 0


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_reader_tells_only_a_writer_that_wants_room(rings: RingPair) -> None:
    """Each read of a message posts it while it does, and none before or after that, nor one that finds nothing."""
    for _ in range(2):
        rings.a.write(bytes(LARGEST))
    rings.b.read()
    assert not rings.a.take_post()
    rings.a.want_room(True)
    rings.b.read()
    assert rings.a.take_post()
    rings.b.read()
    assert not rings.a.take_post()
    rings.a.want_room(False)
    rings.a.write(b"x")
    rings.b.read()
    assert not rings.a.take_post()


def test_a_writer_that_waits_for_room_is_always_told(core: ModuleType, rings: RingPair) -> None:
    """Writer and reader in two threads, blocking until the other posts: neither is forgotten."""
    count = 3000
    bell_a, bell_b = core.Bell(), core.Bell()
    sizes = [random.Random(1).randrange(LARGEST + 1) for _ in range(count)]

    def write() -> None:
        for number, size in enumerate(sizes):
            message = _content(size, number)
            while not rings.a.write(message):
                rings.a.want_room(True)
                if rings.a.write(message):
                    break
                assert bell_a.wait((rings.a,), 60.0)
            rings.a.want_room(False)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    for number, size in enumerate(sizes):
        while (received := rings.b.read()) is None:
            rings.b.sleep(True)
            assert rings.b.readable() or bell_b.wait((rings.b,), 60.0)
        assert received == _content(size, number)
    writer.join()


def test_looking_ends_with_a_message_or_at_the_deadline(rings: RingPair) -> None:
    """``wait_readable`` looks at least once, finds what another thread writes, and gives up at its deadline."""
    assert not rings.b.wait_readable(0.0)
    assert not rings.b.wait_readable(time.perf_counter() + 1e-4)
    later = threading.Timer(0.02, rings.a.write, [b"found"])
    later.start()
    assert rings.b.wait_readable(time.perf_counter() + 60.0)
    assert rings.b.wait_readable(0.0)
    assert rings.b.read() == b"found"
    later.join()


def test_signal_handlers_run_in_a_long_look(rings: RingPair) -> None:
    """A handler may write what is waited for, and may end the look with an exception."""

    def write(_number: int, _frame: object) -> None:
        rings.a.write(b"from a handler")

    def interrupt(_number: int, _frame: object) -> None:
        raise InterruptedError("enough")

    before = signal.signal(signal.SIGALRM, write)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert rings.b.wait_readable(time.perf_counter() + 60.0)
        assert rings.b.read() == b"from a handler"
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(InterruptedError, match="enough"):
            rings.b.wait_readable(time.perf_counter() + 60.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_an_end_counts_once_all_was_read(rings: RingPair) -> None:
    """What was written before the end is still received; the other direction has not ended."""
    rings.a.write(b"last words")
    rings.a.end()
    assert not rings.b.ended()
    assert rings.b.read() == b"last words"
    assert rings.b.ended()
    assert not rings.a.ended()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 8, CELLS_BYTES, CELLS_BYTES + 8, CELLS_BYTES + 20])
def test_memory_that_is_no_rings_is_refused(core: ModuleType, nbytes: int) -> None:
    """It holds the cells and two records, in multiples of 8 bytes."""
    memory, ring = memoryview(bytearray(nbytes)), memoryview(bytearray(message_ring_bytes(0)))
    assert core.MessageRing(ring, ring).largest_message == 4
    for own, peer in ((memory, ring), (ring, memory)):
        with pytest.raises(ValueError, match=f"^{nbytes} bytes can't be a message ring"):
            core.MessageRing(own, peer)


def test_a_ring_keeps_its_memory(core: ModuleType) -> None:
    """Closed segments stay mapped for as long as a ring looks into them."""
    pair = RingPair(LARGEST, core)
    pair.a.write(b"still here")
    pair.close()
    assert pair.b.read() == b"still here"
    assert not pair.a.readable()
