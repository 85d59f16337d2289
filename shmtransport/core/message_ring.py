"""Passes whole messages, in order, from a segment's owner to its peer: the segment's message ring.

::

    0           64          128          192         256         320         384
    ┌───────────┬───────────┬────────────┬───────────┬───────────┬───────────┬────────────────────────────────────────┐
    │ published │ consumed  │ wants room │ ended     │ sleeps    │ posts     │ records: u32 length, payload, padding  │
    └───────────┴───────────┴────────────┴───────────┴───────────┴───────────┴────────────────────────────────────────┘

Each cell has a cache line of its own, so that neither side's writes slow the other's. As everything in a segment, all
cells are written by its owner:

* ``published``: the bytes of all records that the owner has written here so far;
* ``consumed``: the bytes of all records that the owner has read from the *peer's* ring so far;
* ``wants room``: 1 while the owner waits for the peer to read on;
* ``ended``: 1 once the owner has ended the connection;
* ``sleeps``: 1 while the owner waits to be woken when a message comes;
* ``posts``: how often the owner has posted the peer, in the first four bytes: the word that the peer waits for.

Rules that it keeps:

* positions only grow;
* a peer's cell is read once, checked against what this side knows, and then used; a record is copied out once before
  anything in it is looked at. Whatever a peer writes costs it the connection, nothing else;
* a signal handler or a finalizer may read and write here in the middle of a ``read`` or ``write`` of the same thread.
  So each prepares everything first, then checks that its position still holds, and then goes on without calling
  anything until its own change is made: CPython runs neither handlers nor finalizers there;
* a message that was taken from the ring is kept until ``read`` returns it. Where a handler raises before
  that, the next ``read`` returns it, and looks again whether the peer waits for room;
* a peer is posted when it waits for a message and one is published, when it waits for room and some is made, and at
  the end. Each side first announces that it waits, then looks once more; the other first makes its change, then looks
  whether it waits. So one of the two sees the other.
"""

from __future__ import annotations

import ctypes
import struct
import time

from .fences import full_fence, order
from .futex import Word
from .layout import round_up
from .refusals import bad_consumed, bad_length, bad_published, bad_record, bad_ring_memory, message_too_large

_CELL_BYTES = 64
_PUBLISHED, _CONSUMED, _WANTS_ROOM, _ENDED, _SLEEPS, _POSTS = range(6)
_DATA_OFFSET = 6 * _CELL_BYTES
_POSTS_OFFSET = _POSTS * _CELL_BYTES
_LENGTH = struct.Struct("<I")
_LENGTH_BYTES = _LENGTH.size
_pack_length, _length_at = _LENGTH.pack, _LENGTH.unpack_from
_ALIGNMENT = 8
_ROUND_UP = _LENGTH_BYTES + _ALIGNMENT - 1
_LARGEST_RECORDS = 2  # how many of the largest messages fit


def _record_bytes(nbytes: int) -> int:
    return round_up(_LENGTH.size + nbytes, _ALIGNMENT)


def message_ring_bytes(max_message_bytes: int) -> int:
    """The size in bytes of a message ring for messages of up to ``max_message_bytes`` bytes."""
    return _DATA_OFFSET + _LARGEST_RECORDS * _record_bytes(max_message_bytes)


class _Area:
    """One segment's message ring: its cells and the bytes of its records."""

    def __init__(self, memory: memoryview) -> None:
        if memory.nbytes % _ALIGNMENT or memory.nbytes < message_ring_bytes(0):
            raise bad_ring_memory(memory.nbytes)
        # Every eighth cell begins a cache line.
        self.cells = memory[:_DATA_OFFSET].cast("Q")[:: _CELL_BYTES // 8]
        self.data = memory[_DATA_OFFSET:]
        self.posts = Word(ctypes.c_uint32.from_buffer(memory, _POSTS_OFFSET), is_private=False)


class MessageRing:
    """Both directions of one connection: writes to this side's message ring, and reads the peer's.

    Args:
        own: the bytes of the message ring in this side's segment.
        peer: the bytes of the message ring in the peer's segment.

    Raises:
        ValueError: the size of one is not that of a message ring.
    """

    def __init__(self, own: memoryview, peer: memoryview) -> None:
        own_area, peer_area = _Area(own), _Area(peer)
        self._own_cells, self._peer_cells = own_area.cells, peer_area.cells
        self._own_data, self._own_capacity = own_area.data, len(own_area.data)
        self._peer_data, self._peer_capacity = peer_area.data, len(peer_area.data)
        self._own_posts, self.peer_posts = own_area.posts, peer_area.posts
        self._published = 0
        self._peer_consumed = 0
        self._consumed = 0
        self._taken: bytes | None = None
        self._owes_look = False  # whether the peer may wait for the room of what was taken
        self.largest_message = self._own_capacity // _LARGEST_RECORDS - _LENGTH.size
        """In bytes."""

    def readable(self) -> bool:
        """Whether the peer's ring holds something that has not been read yet."""
        return self._taken is not None or self._peer_cells[_PUBLISHED] != self._consumed

    def write(self, data: bytes) -> bool:
        """Publish one message, and post the peer if it sleeps; False if there is no room until the peer reads on.

        Raises:
            MessageTooLarge: it can never fit.
            PeerProtocolError: the peer's count of what it has read is impossible.
        """
        length = len(data)
        if length > self.largest_message:
            raise message_too_large(length, self.largest_message)
        needed = (length + _ROUND_UP) & -_ALIGNMENT
        record = _pack_length(length) + data
        ring, capacity = self._own_data, self._own_capacity
        while True:
            published = self._published
            if published + needed - self._peer_consumed > capacity and not self._has_room(needed):
                return False
            start = published % capacity
            if start + len(record) <= capacity:
                where = slice(start, start + len(record))
                if self._published == published:
                    ring[where] = record
                    self._published = published + needed
                    break
            else:
                first, rest = slice(start, capacity), slice(0, start + len(record) - capacity)
                before, after = record[: capacity - start], record[capacity - start :]
                if self._published == published:
                    ring[first] = before
                    ring[rest] = after
                    self._published = published + needed
                    break
        order()  # the record is written before it is published
        self._own_cells[_PUBLISHED] = self._published
        full_fence()
        if self._peer_cells[_SLEEPS]:
            self._post()
        return True

    def read(self) -> bytes | None:
        """The next message, or None if there is none yet.

        Raises:
            PeerProtocolError: the peer's ring holds what ``write`` never makes.
        """
        while self._taken is not None or self._take():
            if self._owes_look:
                self._look_for_waiting_writer()
            data = self._taken  # None if an inner call has returned it
            self._taken = None
            if data is not None:
                return data
        return None

    def want_room(self, wanted: bool) -> None:
        """Ask the peer for a wake-up when it has read on; look for room again after this and before waiting."""
        self._own_cells[_WANTS_ROOM] = int(wanted)
        full_fence()

    def sleep(self, sleeps: bool) -> None:
        """Say whether this side waits to be woken; having said so, look whether there is something before waiting."""
        self._own_cells[_SLEEPS] = int(sleeps)
        full_fence()

    def take_post(self) -> bool:
        """Whether the peer has posted since this was asked last."""
        taken = self.peer_posts.take()
        order()  # the post is seen before what it is about is looked at
        return taken

    def end(self) -> None:
        """Tell the peer that this side neither reads nor writes any longer."""
        order()
        self._own_cells[_ENDED] = 1
        self._post()

    def ended(self) -> bool:
        """Whether the peer has ended the connection, and everything it wrote has been read."""
        return self._peer_cells[_ENDED] != 0 and not self.readable()

    def wait_readable(self, deadline: float) -> bool:
        """Look until there is something to read, or ``perf_counter`` has reached ``deadline``; whether there is."""
        cells, consumed, clock = self._peer_cells, self._consumed, time.perf_counter
        while self._taken is None and cells[_PUBLISHED] == consumed:
            if clock() >= deadline:
                return False
        return True

    def _post(self) -> None:
        """Wake the peer, or keep its next wait from blocking."""
        order()  # what it is about is written before
        self._own_posts.post()

    def _has_room(self, needed: int) -> bool:
        consumed = self._peer_cells[_CONSUMED]
        if not self._peer_consumed <= consumed <= self._published:
            raise bad_consumed(consumed, self._peer_consumed, self._published)
        self._peer_consumed = consumed
        return self._published + needed - consumed <= self._own_capacity

    def _take(self) -> bool:
        """Copy the next message out of the peer's ring, and give its room back; whether there was one."""
        consumed = self._consumed
        published = self._peer_cells[_PUBLISHED]
        unread = published - consumed
        if not unread:
            return False
        order()  # the record is read after the position that published it
        ring, capacity = self._peer_data, self._peer_capacity
        if not 0 < unread <= capacity or unread % _ALIGNMENT:
            raise bad_published(published, consumed, capacity)
        start = consumed % capacity
        (length,) = _length_at(ring, start)
        needed = (length + _ROUND_UP) & -_ALIGNMENT
        if needed > unread:
            raise bad_record(length, unread)
        if length > self.largest_message:  # the ring has room for two of these, so a larger one fits, too
            raise bad_length(length, self.largest_message)
        begin = start + _LENGTH_BYTES
        data = ring[begin : begin + length].tobytes()
        if begin + length > capacity:
            data += ring[: begin + length - capacity].tobytes()
        after = consumed + needed
        order()  # the record is copied before its room is given back
        if self._consumed == consumed:  # else an inner call has taken this one
            self._taken = data
            self._owes_look = True
            self._consumed = after
            self._own_cells[_CONSUMED] = after
        return True

    def _look_for_waiting_writer(self) -> None:
        """Wake the peer if it waits for the room of what was taken."""
        try:
            self._owes_look = False  # an inner read returns what was taken at once
            full_fence()  # a writer without room announces that, then looks again: one of the two sees the other
            if self._peer_cells[_WANTS_ROOM]:
                self._post()
        except BaseException:
            self._owes_look = True
            raise
