"""The message ring."""

from __future__ import annotations

from random import Random
from typing import ClassVar

import msgspec

from shmtransport.core import MessageRing
from shmtransport.core.layout import PAGE_BYTES, Layout
from shmtransport.core.message_ring import message_ring_bytes
from shmtransport.memory.segment import Segment

from .. import mutations
from ..rule import Target


class _Step(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The peer writes its cells and, at ``at``, the length of a record; then this side writes ``send`` bytes."""

    at: int
    length: int
    published: int
    consumed: int
    ended: int
    send: int


_steps = msgspec.msgpack.Decoder(list[_Step])


class RingReading(Target):
    """``MessageRing``: whatever the peer has in its cells and records, a message is no longer than its ring."""

    name = "message ring"
    message_bytes: ClassVar[int] = 256
    area: ClassVar[int] = 256  # where the records begin, after four cells of 64 bytes

    def __init__(self) -> None:
        layout = Layout(PAGE_BYTES, 1, message_ring_bytes(self.message_bytes))
        self._own, self._peer = Segment.create(layout), Segment.create(layout)
        start, end = layout.message_ring_offset, layout.message_ring_offset + layout.message_ring_bytes
        self._rings = [segment.view[start:end] for segment in (self._own, self._peer)]
        self._empty = bytes(end - start)
        self._capacity = end - start - self.area

    def generate(self, random: Random) -> bytes:
        steps = []
        position = sent = taken = 0
        for _ in range(random.randrange(1, 8)):
            length = random.choice((0, 1, 5, 100, self.message_bytes, random.randrange(self.message_bytes)))
            at, step = position, -(-(4 + length) // 8) * 8
            position += step
            damaged = random.random() < 0.35
            claimed = random.choice((length, step - 3, self._capacity, random.choice(mutations.BOUNDARIES) % 2**32))
            published = random.choice(
                (position + 8, position - 1, at + self._capacity + 8, random.choice(mutations.BOUNDARIES))
            )
            if random.random() < 0.5:
                taken = sent
            consumed = random.choice((sent + 8, sent + 2**32, taken - 8, random.choice(mutations.BOUNDARIES)))
            send = random.choice((0, 1, 100, self.message_bytes, self.message_bytes))
            sent += -(-(4 + send) // 8) * 8
            steps.append(
                _Step(
                    at,
                    claimed if damaged and random.random() < 0.5 else length,
                    published % 2**64 if damaged and random.random() < 0.5 else position,
                    consumed % 2**64 if random.random() < 0.2 else taken,
                    int(random.random() < 0.1),
                    send,
                )
            )
        return msgspec.msgpack.encode(steps)

    def check(self, data: bytes) -> None:
        for ring in self._rings:
            ring[:] = self._empty
        hostile = self._rings[1]
        ring = MessageRing(self._own.message_ring, self._peer.message_ring)
        taken = 0
        for step in _steps.decode(data):
            at = self.area + step.at % self._capacity // 8 * 8
            hostile[at : at + 4] = step.length.to_bytes(4, "little")
            for cell, number in ((0, step.published), (1, step.consumed), (3, step.ended)):
                hostile[64 * cell : 64 * cell + 8] = number.to_bytes(8, "little")
            read = 0
            while (message := ring.read()) is not None:
                assert ring.largest_message >= 0
                assert len(message) <= self._capacity, f"a message has {len(message)} bytes"
                read += 1
                assert read <= self._capacity // 8, "more messages were read than the ring can hold"
            assert not ring.readable()
            assert ring.ended() == bool(step.ended)
            ring.write(b"x" * step.send)
            published = int.from_bytes(self._rings[0][:8], "little")
            taken = max(taken, step.consumed) if step.consumed <= published else taken
            assert published - taken <= self._capacity, "a message that the peer has not read was overwritten"

    def close(self) -> None:
        self._rings.clear()
        self._own.close()
        self._peer.close()
