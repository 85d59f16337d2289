"""The message ring of a segment: whole messages, in order, from the segment's owner to its peer.

::

    0            64           128          192          256
    ┌────────────┬────────────┬────────────┬────────────┬────────────────────────────────────────────┐
    │ published  │ consumed   │ wants room │ ended      │ records: u32 length, payload, padding to 8 │
    └────────────┴────────────┴────────────┴────────────┴────────────────────────────────────────────┘

One cache line for each of the cells, so that neither side's writes slow the other's. All are written by the owner of
the segment, as everything in it:

* ``published``: bytes of records that the owner has ever written here;
* ``consumed``: bytes of records that the owner has ever read from the *peer's* ring;
* ``wants room``: 1 while the owner waits for the peer to read on;
* ``ended``: 1 once the owner has ended the connection; for the case that a goodbye found no room.

Rules: positions only grow. A peer's cell is read once, checked against what this side knows, and then used; a record
is copied out once before anything in it is looked at. Whatever a peer writes costs it the connection, nothing else.

A signal handler or a finalizer may read and write here in the middle of a ``read`` or ``write`` of the same thread. So
each prepares everything first, then checks that its position still holds, and then goes on without calling anything:
CPython runs neither handlers nor finalizers there.
"""

from __future__ import annotations

import struct
import time

from .errors import MessageTooLarge, PeerProtocolError
from .fences import full_fence, order
from .layout import round_up
from .segment import Segment

_CELL_BYTES = 64
_PUBLISHED, _CONSUMED, _WANTS_ROOM, _ENDED = range(4)
_DATA_OFFSET = 4 * _CELL_BYTES
_LENGTH = struct.Struct("<I")
_LENGTH_BYTES = _LENGTH.size
_pack_length, _length_at = _LENGTH.pack, _LENGTH.unpack_from
_ALIGNMENT = 8
_ROUND_UP = _LENGTH_BYTES + _ALIGNMENT - 1
_LARGEST_RECORDS = 2  # how many of the largest messages fit


def _record_bytes(nbytes: int) -> int:
    return round_up(_LENGTH.size + nbytes, _ALIGNMENT)


def message_ring_bytes(max_message_bytes: int) -> int:
    """How large a message ring must be for messages of up to ``max_message_bytes`` bytes."""
    return _DATA_OFFSET + _LARGEST_RECORDS * _record_bytes(max_message_bytes)


class _Area:
    """One segment's message ring: its cells and the bytes of its records."""

    def __init__(self, segment: Segment) -> None:
        layout = segment.layout
        start, end = layout.message_ring_offset, layout.message_ring_offset + layout.message_ring_bytes
        # Every eighth cell begins a cache line.
        self.cells = segment.view[start : start + _DATA_OFFSET].cast("Q")[:: _CELL_BYTES // 8]
        self.data = segment.view[start + _DATA_OFFSET : end]


class MessageRing:
    """Both directions of one connection: writes to the ring in ``own``, reads the one in ``peer``."""

    def __init__(self, own: Segment, peer: Segment) -> None:
        own_area, peer_area = _Area(own), _Area(peer)
        self._own_cells, self._peer_cells = own_area.cells, peer_area.cells
        self._own_data, self._own_capacity = own_area.data, len(own_area.data)
        self._peer_data, self._peer_capacity = peer_area.data, len(peer_area.data)
        self._published = 0
        self._peer_consumed = 0
        self._consumed = 0
        self.largest_message = self._own_capacity // _LARGEST_RECORDS - _LENGTH.size
        self.made_room = False
        """Whether ``read`` has made room that the peer waits for; whoever rings the peer sets it back."""

    def readable(self) -> bool:
        """Whether the peer's ring holds something that was not read yet."""
        return self._peer_cells[_PUBLISHED] != self._consumed

    def write(self, data: bytes) -> bool:
        """Publish one message; False if there is no room until the peer reads on.

        Raises:
            MessageTooLarge: it could never fit.
            PeerProtocolError: the peer's count of what it has read is impossible.
        """
        length = len(data)
        if length > self.largest_message:
            raise MessageTooLarge(
                f"a message of {length} bytes can't pass a message ring that takes {self.largest_message}: "
                "send large data as tensors, or raise max_message_bytes on both sides"
            )
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
        order()  # the record is there before it is published
        self._own_cells[_PUBLISHED] = self._published
        return True

    def read(self) -> bytes | None:
        """The next message, or None if there is none yet.

        Raises:
            PeerProtocolError: the peer's ring is not what a ring can be.
        """
        consumed = self._consumed
        unread = self._peer_cells[_PUBLISHED] - consumed
        if not unread:
            return None
        order()  # the record is read after the position that published it
        ring, capacity = self._peer_data, self._peer_capacity
        if not 0 < unread <= capacity or unread % _ALIGNMENT:
            raise PeerProtocolError(
                f"the peer has published {unread} bytes beyond what was read; its message ring takes {capacity}"
            )
        start = consumed % capacity
        (length,) = _length_at(ring, start)
        needed = (length + _ROUND_UP) & -_ALIGNMENT
        if needed > unread:
            raise PeerProtocolError(f"the peer's message ring names a record of {length} bytes; {unread} are there")
        if length > self.largest_message:  # the ring takes two of these; one may not be as large as both
            raise PeerProtocolError(f"the peer sent a message of {length} bytes; {self.largest_message} were agreed")
        begin = start + _LENGTH_BYTES
        data = ring[begin : begin + length].tobytes()
        if begin + length > capacity:
            data += ring[: begin + length - capacity].tobytes()
        order()  # the record is copied before its room is given back
        if self._consumed != consumed:  # an inner call has taken this one
            return self.read()
        self._consumed = consumed + needed
        self._own_cells[_CONSUMED] = self._consumed
        full_fence()  # a writer without room says so, then looks again: one of the two sees the other
        if self._peer_cells[_WANTS_ROOM]:
            self.made_room = True
        return data

    def want_room(self, wanted: bool) -> None:
        """Tell the peer to ring when it has read on; look for room again after this and before waiting."""
        self._own_cells[_WANTS_ROOM] = int(wanted)
        full_fence()

    def end(self) -> None:
        """Tell the peer that this side will neither read nor write any more."""
        order()
        self._own_cells[_ENDED] = 1

    def ended(self) -> bool:
        """Whether the peer has ended the connection and all that it had written was read."""
        return self._peer_cells[_ENDED] != 0 and not self.readable()

    def wait_readable(self, deadline: float) -> bool:
        """Look until there is something to read or the performance counter reaches ``deadline``; whether there is."""
        cells, consumed, clock = self._peer_cells, self._consumed, time.perf_counter
        while cells[_PUBLISHED] == consumed:
            if clock() >= deadline:
                return False
        return True

    def _has_room(self, needed: int) -> bool:
        consumed = self._peer_cells[_CONSUMED]
        if not self._peer_consumed <= consumed <= self._published:
            raise PeerProtocolError(
                f"the peer says that it has read {consumed} bytes of messages; between {self._peer_consumed} and "
                f"{self._published} are possible"
            )
        self._peer_consumed = consumed
        return self._published + needed - consumed <= self._own_capacity
