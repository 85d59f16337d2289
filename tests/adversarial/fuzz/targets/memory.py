"""Headers of segments, descriptors, and the views that are borrowed by them."""

from __future__ import annotations

import math
from random import Random
from typing import ClassVar

import msgspec
import torch

from shmtransport.core.layout import PAGE_BYTES, RELEASE_CELL_BYTES, Layout
from shmtransport.errors import (
    PeerProtocolError,
)
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.dtypes import BY_NAME
from tests.support.arenas import Pair, raw

from .. import mutations
from ..rule import Target
from .outcomes import check_descriptors


class _Described(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A descriptor, and the sizes that it is validated against."""

    data_bytes: int
    release_slots: int
    descriptor: TensorDescriptor


class Validating(Target):
    """``TensorDescriptor.validate``: what it lets pass lies within the data area, is aligned, and can be released."""

    name = "validate"

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(_Described)

    def generate(self, random: Random) -> bytes:
        data_bytes, slots = random.choice(((PAGE_BYTES, 16), (PAGE_BYTES, 1), (1 << 20, 4096), (1 << 40, 4096)))
        descriptor = mutations.descriptor(random, data_bytes, slots)
        return mutations.array_of([*map(msgspec.msgpack.encode, (data_bytes, slots)), descriptor])

    def check(self, data: bytes) -> None:
        try:
            given = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # no message could have it
            raise PeerProtocolError from error
        descriptor = given.descriptor
        row, nbytes = descriptor.validate(given.data_bytes, given.release_slots)
        check_descriptors((descriptor,))
        assert row.name == descriptor.dtype
        assert nbytes == math.prod(descriptor.shape) * row.itemsize, f"it has {nbytes} bytes"
        if nbytes == 0:
            assert descriptor.sequence == 0, "nothing is there to be released"
            return
        assert 0 <= descriptor.offset <= given.data_bytes - nbytes, "it lies beyond the data area"
        assert descriptor.offset % row.itemsize == 0, "it is not aligned"
        assert 0 <= descriptor.slot < given.release_slots, "there is no such slot"
        assert descriptor.sequence >= 1, "it can't be released"


_SIZE_BYTES = 8


class HeaderReading(Target):
    """``Layout.from_header``: the areas follow each other within the segment, whose size is the input's end."""

    name = "header"

    def generate(self, random: Random) -> bytes:
        layout = Layout(
            *random.choice(((PAGE_BYTES,), (8 * PAGE_BYTES, 16), (1, 1, 700), (0, 0, 0), (1 << 40, 4096, 9)))
        )
        header, segment_bytes = layout.header(), layout.total_bytes
        kind = random.random()
        if kind < 0.7:
            header = mutations.damaged_header(random, header)
        elif kind < 0.9:
            header = mutations.mutate(random, (header,))
        if random.random() < 0.5:
            segment_bytes = random.choice(mutations.BOUNDARIES) % 2**63
        return header + segment_bytes.to_bytes(_SIZE_BYTES, "little")

    def check(self, data: bytes) -> None:
        header, segment_bytes = data[:-_SIZE_BYTES], int.from_bytes(data[-_SIZE_BYTES:], "little")
        layout = Layout.from_header(header, segment_bytes)
        assert layout.header() == header
        ends = (
            PAGE_BYTES,
            layout.message_ring_offset + layout.message_ring_bytes,
            layout.release_offset + layout.release_slots * RELEASE_CELL_BYTES,
            layout.data_offset + layout.data_bytes,
        )
        starts = (layout.message_ring_offset, layout.release_offset, layout.data_offset, segment_bytes)
        assert all(end <= start for end, start in zip(ends, starts, strict=True)), f"areas overlap: {ends}, {starts}"


class Borrowing(Target):
    """``ReceiveArena.borrow``: a view shows the bytes that its descriptor names, and is released once, by name.

    The input is a list of descriptors; all borrows are held until the last.
    """

    name = "borrow"
    data_bytes: ClassVar[int] = PAGE_BYTES
    slots: ClassVar[int] = 16

    def __init__(self) -> None:
        self._pair = Pair(self.data_bytes, self.slots)
        self._content = Random(0).randbytes(self.data_bytes)
        start = self._pair.owner.layout.data_offset
        self._pair.owner.view[start : start + self.data_bytes] = self._content
        self._decoder = msgspec.msgpack.Decoder(list[TensorDescriptor])
        self._before = [0] * self.slots
        self._due: list[TensorDescriptor] = []

    def generate(self, random: Random) -> bytes:
        descriptors = [mutations.descriptor(random, self.data_bytes, self.slots) for _ in range(random.randrange(1, 5))]
        if random.random() < 0.3:
            descriptors.append(random.choice(descriptors))
        return mutations.array_of(descriptors)

    def check(self, data: bytes) -> None:
        try:
            descriptors = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # no message could have it
            raise PeerProtocolError from error
        self._before = list(self._pair.cells)
        self._due = []
        held = []
        for descriptor in descriptors:
            held.append(self._pair.receive.borrow(descriptor))
            if held[-1].nbytes:
                self._due.append(descriptor)
            self._look_at(held[-1], descriptor)
            assert len(self._pair.receive) == len(self._due), "borrows were miscounted"
            assert list(self._pair.cells) == self._before, "a borrow was released before its end"

    def _look_at(self, tensor: torch.Tensor, descriptor: TensorDescriptor) -> None:
        row = BY_NAME[descriptor.dtype]
        assert (tensor.shape, tensor.dtype) == (descriptor.shape, row.torch), "shape or dtype is another"
        end = descriptor.offset + tensor.nbytes
        assert not tensor.nbytes or raw(tensor) == self._content[descriptor.offset : end], "it shows other bytes"

    def leftovers(self) -> str:
        if len(self._pair.receive):
            return f"{len(self._pair.receive)} borrows stay held"
        cells = list(self._pair.cells)
        for slot in range(self.slots):
            due = [descriptor.sequence for descriptor in self._due if descriptor.slot == slot]
            if cells[slot] not in (due or [self._before[slot]]):
                return f"release cell {slot} has {cells[slot]}; {due or 'nothing'} was borrowed by it"
        return ""

    def close(self) -> None:
        self._pair.close()
