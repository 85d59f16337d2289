"""Computes where everything lies in a segment; the only place that knows an offset.

::

    offset 0                 one page                       each area starts on a page
    ┌────────────────────────┬──────────────┬───────────────┬──────────────────────────────┐
    │ header                 │ message ring │ release table │ data                         │
    └────────────────────────┴──────────────┴───────────────┴──────────────────────────────┘
     magic, version, sizes    reserved for   u64 a slot:     blocks, 64-byte aligned,
     (``HEADER``)             the doorbell   sequence of     placed by the allocator
                                             the block that
                                             the owner of
                                             this segment
                                             has released

Rules that it keeps:

* every byte of a segment is written by its owner alone;
* the header is written once, before the peer is told the name; the peer copies it once and checks that copy;
* a reader never trusts an offset from the header: it recomputes all of them from the three sizes and requires that they
  agree.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import PeerProtocolError

FORMAT_VERSION = 4
MAGIC = b"SHMTENSR"
PAGE_BYTES = 4096
BLOCK_ALIGNMENT = 64
RELEASE_CELL_BYTES = 8
DEFAULT_RELEASE_SLOTS = 4096

HEADER = struct.Struct("<8sII7Q")
"""magic, format version, header bytes, total bytes, then offset and size of the three areas (slots for the table)."""


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Sizes of a segment's areas; all offsets follow from them.

    ``data_bytes`` and ``message_ring_bytes`` are in bytes, ``release_slots`` counts 8-byte cells.
    """

    data_bytes: int
    release_slots: int = DEFAULT_RELEASE_SLOTS
    message_ring_bytes: int = 0

    @property
    def message_ring_offset(self) -> int:
        return PAGE_BYTES

    @property
    def release_offset(self) -> int:
        return self.message_ring_offset + round_up(self.message_ring_bytes, PAGE_BYTES)

    @property
    def release_bytes(self) -> int:
        return self.release_slots * RELEASE_CELL_BYTES

    @property
    def data_offset(self) -> int:
        return self.release_offset + round_up(self.release_bytes, PAGE_BYTES)

    @property
    def total_bytes(self) -> int:
        return self.data_offset + round_up(self.data_bytes, PAGE_BYTES)

    def header(self) -> bytes:
        """The bytes that the owner writes at offset 0."""
        return HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            HEADER.size,
            self.total_bytes,
            self.message_ring_offset,
            self.message_ring_bytes,
            self.release_offset,
            self.release_slots,
            self.data_offset,
            self.data_bytes,
        )

    @classmethod
    def from_header(cls, header: bytes, segment_bytes: int) -> Layout:
        """Check a private copy of a peer's header against the segment's real size.

        Raises:
            PeerProtocolError: the magic or the version is another, or a size or an offset is not what the sizes imply.
        """
        if len(header) != HEADER.size:
            raise PeerProtocolError(f"segment header has {len(header)} bytes; {HEADER.size} are needed")
        magic, version, _, _, _, ring_bytes, _, slots, _, data_bytes = HEADER.unpack(header)
        if magic != MAGIC:
            raise PeerProtocolError("the peer's segment does not start with this format's magic bytes")
        if version != FORMAT_VERSION:
            raise PeerProtocolError(
                f"the peer's segment has format version {version}; this side speaks {FORMAT_VERSION}: "
                "install the same shmtransport on both sides"
            )
        if max(data_bytes, slots, ring_bytes) > segment_bytes:
            raise PeerProtocolError(f"the peer's segment header names areas beyond its {segment_bytes} bytes")
        layout = cls(data_bytes=data_bytes, release_slots=slots, message_ring_bytes=ring_bytes)
        # The size first: it bounds what the header's fields would have to hold.
        if layout.total_bytes != segment_bytes or layout.header() != header:
            raise PeerProtocolError(
                f"the peer's segment header contradicts itself or the segment's size of {segment_bytes} bytes"
            )
        return layout
