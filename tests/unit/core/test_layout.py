"""Segment layout: areas in order, page-aligned, and headers that are checked before they are believed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmtransport.core.layout import (
    BLOCK_ALIGNMENT,
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    PAGE_BYTES,
    RELEASE_CELL_BYTES,
    Layout,
    round_up,
)
from shmtransport.errors import PeerProtocolError

LAYOUTS = st.builds(
    Layout,
    data_bytes=st.integers(1, 1 << 40),
    release_slots=st.integers(1, 1 << 20),
    message_ring_bytes=st.integers(0, 1 << 24),
)


@given(st.integers(0, 1 << 70), st.integers(1, 1 << 20))
@settings(max_examples=100)
def test_round_up_is_the_smallest_multiple_not_below(count: int, multiple: int) -> None:
    """The result is a multiple, not below the count, and less than one multiple above it."""
    rounded = round_up(count, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - count < multiple


@given(LAYOUTS)
@settings(max_examples=100)
def test_areas_start_on_pages_in_order_and_never_overlap(layout: Layout) -> None:
    """Header, message ring, release table and data follow each other; each starts on a page of its own."""
    starts = [0, layout.message_ring_offset, layout.release_offset, layout.data_offset, layout.total_bytes]
    sizes = [HEADER.size, layout.message_ring_bytes, layout.release_bytes, layout.data_bytes]
    assert all(start % PAGE_BYTES == 0 for start in starts)
    for start, size, following in zip(starts[:-1], sizes, starts[1:], strict=True):
        assert start + size <= following
    assert layout.release_bytes == layout.release_slots * RELEASE_CELL_BYTES


@given(LAYOUTS)
@settings(max_examples=100)
def test_a_header_round_trips(layout: Layout) -> None:
    """What ``header`` writes, ``from_header`` reads back as the same layout."""
    assert Layout.from_header(layout.header(), layout.total_bytes) == layout


def test_the_data_area_is_aligned_for_blocks() -> None:
    """The data area's start is aligned for every block and every dtype."""
    assert Layout(data_bytes=1).data_offset % BLOCK_ALIGNMENT == 0


@given(LAYOUTS, st.integers(0, HEADER.size - 1), st.integers(1, 255))
@settings(max_examples=200)
def test_one_changed_byte_is_never_the_same_layout(layout: Layout, index: int, change: int) -> None:
    """A header with any byte changed is refused: every field is either fixed or implied by the others."""
    header = bytearray(layout.header())
    header[index] ^= change
    try:
        found = Layout.from_header(bytes(header), layout.total_bytes)
    except PeerProtocolError:
        return
    # Only sizes that round to the same pages may be told apart by nothing but themselves.
    assert found != layout
    assert found.header() == bytes(header)
    assert found.total_bytes == layout.total_bytes


def test_other_magic_bytes_are_refused() -> None:
    """A segment of something else is told apart by its magic."""
    layout = Layout(data_bytes=4096)
    with pytest.raises(PeerProtocolError, match="magic"):
        Layout.from_header(b"NOTMINE!" + layout.header()[8:], layout.total_bytes)


def test_another_format_version_is_refused_with_both_versions() -> None:
    """Both versions and the remedy are named."""
    layout = Layout(data_bytes=4096)
    header = bytearray(layout.header())
    struct.pack_into("<I", header, len(MAGIC), 77)
    with pytest.raises(PeerProtocolError, match=f"version 77; this side speaks {FORMAT_VERSION}.*install the same"):
        Layout.from_header(bytes(header), layout.total_bytes)


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size + 1])
def test_a_header_of_another_length_is_refused(length: int) -> None:
    """A truncated header is refused with its length and the needed one."""
    header = (Layout(data_bytes=4096).header() + b"\0")[:length]
    with pytest.raises(PeerProtocolError, match=f"{length} bytes; {HEADER.size}"):
        Layout.from_header(header, 1 << 20)


@pytest.mark.parametrize("error", [-PAGE_BYTES, -1, 1, PAGE_BYTES])
def test_the_segments_real_size_must_agree(error: int) -> None:
    """A segment shorter (a SIGBUS to come) or longer than its header says is refused."""
    layout = Layout(data_bytes=3 * PAGE_BYTES)
    with pytest.raises(PeerProtocolError, match=f"size of {layout.total_bytes + error} bytes"):
        Layout.from_header(layout.header(), layout.total_bytes + error)


@pytest.mark.parametrize("field", range(3, 10))
def test_a_header_that_contradicts_itself_is_refused(field: int) -> None:
    """No offset is believed: each must be what the sizes imply."""
    layout = Layout(data_bytes=64 * PAGE_BYTES, message_ring_bytes=PAGE_BYTES)
    fields = list(HEADER.unpack(layout.header()))
    fields[field] += 8 * PAGE_BYTES
    with pytest.raises(PeerProtocolError):
        Layout.from_header(HEADER.pack(*fields), layout.total_bytes)


@pytest.mark.parametrize("field", [5, 7, 9])
def test_sizes_that_overflow_are_refused(field: int) -> None:
    """Sizes whose sum exceeds 64 bits are the peer's error, never one of this side."""
    fields = list(HEADER.unpack(Layout(data_bytes=4096).header()))
    fields[field] = 2**64 - 1
    with pytest.raises(PeerProtocolError):
        Layout.from_header(HEADER.pack(*fields), 1 << 20)
