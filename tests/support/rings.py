"""Both directions of one connection's message ring in one process, and an owner that writes there what it likes."""

from __future__ import annotations

import ctypes
import struct
from types import ModuleType

import shmtransport.core
from shmtransport.core.futex import Word
from shmtransport.core.layout import PAGE_BYTES, Layout, round_up
from shmtransport.core.message_ring import message_ring_bytes
from shmtransport.memory.segment import Segment

CELL_BYTES = 64
PUBLISHED, CONSUMED, WANTS_ROOM, ENDED, SLEEPS, POSTS = range(6)
CELLS_BYTES = 6 * CELL_BYTES
LENGTH_BYTES = 4
RECORD_ALIGNMENT = 8


def record_bytes(nbytes: int) -> int:
    """What a message of this size takes in a ring: its length, itself, and padding."""
    return round_up(LENGTH_BYTES + nbytes, RECORD_ALIGNMENT)


class RingPair:
    """Sides A and B, each with a segment of its own and a mapping of the other's; ``cores`` are their twins."""

    def __init__(self, max_message_bytes: int = 60, *cores: ModuleType) -> None:
        of_a, of_b = cores[0] if cores else shmtransport.core, cores[-1] if cores else shmtransport.core
        layout = Layout(
            data_bytes=PAGE_BYTES, release_slots=8, message_ring_bytes=message_ring_bytes(max_message_bytes)
        )
        self.segment_a, self.segment_b = Segment.create(layout), Segment.create(layout)
        seen_by_b = Segment.attach(self.segment_a.name, layout)
        seen_by_a = Segment.attach(self.segment_b.name, layout)
        self._segments = [self.segment_a, self.segment_b, seen_by_a, seen_by_b]
        self.a = of_a.MessageRing(self.segment_a.message_ring, seen_by_a.message_ring)
        self.b = of_b.MessageRing(self.segment_b.message_ring, seen_by_b.message_ring)
        self.capacity = 2 * record_bytes(max_message_bytes)

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


class Forger:
    """The owner of a segment, writing into its message ring without any rule."""

    def __init__(self, segment: Segment, capacity: int) -> None:
        self._segment = segment
        self._start = segment.layout.message_ring_offset
        self._records = self._start + CELLS_BYTES
        self.capacity = capacity

    def cell(self, index: int) -> int:
        """What stands in a cell."""
        (value,) = struct.unpack_from("<Q", self._segment.view, self._start + index * CELL_BYTES)
        return int(value)

    def set_cell(self, index: int, value: int) -> None:
        struct.pack_into("<Q", self._segment.view, self._start + index * CELL_BYTES, value)

    def post(self) -> None:
        """Post the peer, whether it waits for that or not."""
        posts = ctypes.c_uint32.from_buffer(self._segment.view, self._start + POSTS * CELL_BYTES)
        Word(posts, is_private=False).post()

    def set_records(self, data: bytes) -> None:
        """Write the whole area of the records."""
        assert len(data) == self.capacity
        self._segment.view[self._records : self._records + self.capacity] = data

    def publish(self, data: bytes, length: int) -> None:
        """Write a record that claims this length, and post the peer."""
        published = self.cell(PUBLISHED)
        start = self._records + published % self.capacity
        assert start + record_bytes(len(data)) <= self._records + self.capacity, "it does not fit in one piece"
        self._segment.view[start : start + LENGTH_BYTES + len(data)] = struct.pack("<I", length) + data
        self.set_cell(PUBLISHED, published + record_bytes(len(data)))
        self.post()

    def set_length(self, position: int, length: int) -> None:
        """Write the length of the record at a position."""
        struct.pack_into("<I", self._segment.view, self._records + position % self.capacity, length)

    def mark_surroundings(self, mark: int) -> None:
        """Fill all bytes of the segment that are no cell of the ring and no record."""
        view, end = self._segment.view, self._records + self.capacity
        view[: self._start] = bytes([mark]) * self._start
        view[end:] = bytes([mark]) * (len(view) - end)
        for index in range(6):
            start = self._start + index * CELL_BYTES + 8
            view[start : start + CELL_BYTES - 8] = bytes([mark]) * (CELL_BYTES - 8)
