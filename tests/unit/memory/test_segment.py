"""Segments: private names and modes, no trace left behind, and peers' segments checked before use."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator

import posix_ipc
import pytest

from shmtransport.core.layout import HEADER, Layout
from shmtransport.errors import PeerProtocolError, SegmentError
from shmtransport.memory.mapped_file import mapping_of
from shmtransport.memory.segment import NAME_PREFIX, SEGMENTS, Segment

LAYOUT = Layout(data_bytes=8192, release_slots=16)


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(LAYOUT)
    yield made
    made.close()


def _ours() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(NAME_PREFIX[1:])}


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_segment_is_private_to_its_user(segment: Segment) -> None:
    """Mode 0600, owned by this user."""
    found = os.stat(f"/dev/shm{segment.name}")
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()


def test_names_are_random_and_of_the_agreed_form() -> None:
    """128 random bits a name: no two alike, each of the form that ``attach`` accepts."""
    segments = [Segment.create(LAYOUT) for _ in range(8)]
    try:
        names = {segment.name for segment in segments}
        assert len(names) == 8
        assert all(SEGMENTS.is_name(name) for name in names)
    finally:
        for segment in segments:
            segment.close()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "/shmtransport-",
        "/shmtransport-" + "a" * 31,
        "/shmtransport-" + "a" * 33,
        "/shmtransport-" + "A" * 32,
        "/shmtransport-" + "a" * 32 + "\n",
        "shmtransport-" + "a" * 32,
        "/shmtransport-../" + "a" * 29,
        "/other-" + "a" * 32,
        "/shmtransport-" + "\u0661" * 32,
    ],
)
def test_other_names_are_never_opened(name: str) -> None:
    """A peer can't make this side open anything but a segment of ours."""
    assert not SEGMENTS.is_name(name)
    with pytest.raises(PeerProtocolError, match="never makes"):
        Segment.attach(name, LAYOUT)


def test_all_bytes_are_reserved_at_creation(segment: Segment) -> None:
    """Every page has its memory from the start, so that a write can't raise SIGBUS later."""
    found = os.fstat(segment.fd)
    assert found.st_size == LAYOUT.total_bytes
    assert found.st_blocks * 512 >= LAYOUT.total_bytes


def test_the_header_stands_at_offset_0(segment: Segment) -> None:
    """The owner writes the header; the view covers the whole segment."""
    assert bytes(segment.view[: HEADER.size]) == LAYOUT.header()
    assert segment.view.nbytes == LAYOUT.total_bytes
    assert segment.owned


def test_attaching_and_closing_leave_the_owners_name(segment: Segment) -> None:
    """A peer may have named what is another's: only the owner, or one who knows the owner, removes a name."""
    peer = Segment.attach(segment.name, LAYOUT)
    assert peer.layout == LAYOUT
    assert not peer.owned
    peer.unlink()
    peer.close()
    assert segment.name[1:] in _ours()


def test_a_name_is_removed_for_an_owner_that_is_known(segment: Segment) -> None:
    """Once both sides have it mapped, nothing of it is left in /dev/shm, so that a kill leaves no trace."""
    peer = Segment.attach(segment.name, LAYOUT)
    peer.unlink_for_owner()
    assert segment.name[1:] not in _ours()
    segment.unlink()  # the owner need not know of it
    peer.close()


def test_both_sides_see_the_same_bytes(segment: Segment) -> None:
    """What one side writes, the other reads at the same offset."""
    peer = Segment.attach(segment.name, LAYOUT)
    segment.view[LAYOUT.data_offset : LAYOUT.data_offset + 5] = b"hello"
    assert bytes(peer.view[LAYOUT.data_offset : LAYOUT.data_offset + 5]) == b"hello"
    peer.view[-3:] = b"end"
    assert bytes(segment.view[-3:]) == b"end"
    peer.close()


def test_a_segment_without_a_name_can_not_be_attached(segment: Segment) -> None:
    """After its name is gone, no other process can map it; the error does not repeat the name."""
    peer = Segment.attach(segment.name, LAYOUT)
    segment.unlink()
    with pytest.raises(PeerProtocolError, match="can't be opened") as caught:
        Segment.attach(segment.name, LAYOUT)
    assert segment.name not in str(caught.value)
    peer.close()


def test_closing_and_unlinking_twice_does_nothing(segment: Segment) -> None:
    """Close and unlink are idempotent, in any order and on both sides; every file descriptor is given back."""
    peer = Segment.attach(segment.name, LAYOUT)
    fds = _open_fds()
    each = 2 if isinstance(mapping_of(segment.view), mmap.mmap) else 1  # Python's mapping has a descriptor of its own
    for _ in range(2):
        segment.unlink()
        segment.close()
        peer.close()
        peer.unlink()
    assert _open_fds() == fds - 2 * each
    assert segment.fd == peer.fd == -1


def test_unlinking_never_removes_another_segment_of_the_same_name(segment: Segment) -> None:
    """A second unlink is no second removal: a name that was recreated in between stays."""
    segment.unlink()
    other = posix_ipc.SharedMemory(segment.name, posix_ipc.O_CREX, mode=0o600, size=4096)
    try:
        segment.close()
        assert segment.name[1:] in _ours()
    finally:
        os.close(other.fd)
        posix_ipc.unlink_shared_memory(segment.name)


def test_a_view_outlives_close(segment: Segment) -> None:
    """A view into a closed segment still reads valid memory."""
    view = segment.view[LAYOUT.data_offset : LAYOUT.data_offset + 4]
    view[:] = b"kept"
    segment.close()
    assert bytes(view) == b"kept"
    view[:] = b"also"
    assert bytes(view) == b"also"
    assert segment.view.nbytes == 0


def test_a_missing_segment_is_the_peers_error() -> None:
    """A well-formed name of nothing is refused."""
    with pytest.raises(PeerProtocolError, match="can't be opened"):
        Segment.attach(NAME_PREFIX + "0" * 32, LAYOUT)


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 4096, b"x" * 4096])
def test_a_foreign_header_is_refused_and_nothing_stays_open(content: bytes) -> None:
    """A segment without our header is not mapped, and its file descriptor is closed."""
    name = NAME_PREFIX + "f" * 32
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    try:
        os.ftruncate(memory.fd, len(content))
        os.pwrite(memory.fd, content, 0)
        fds = _open_fds()
        with pytest.raises(PeerProtocolError):
            Segment.attach(name, LAYOUT)
        assert _open_fds() == fds
    finally:
        os.close(memory.fd)
        posix_ipc.unlink_shared_memory(name)


@pytest.mark.parametrize(
    "agreed",
    [Layout(data_bytes=4096, release_slots=16), Layout(data_bytes=8192, release_slots=8)],
    ids=["data", "slots"],
)
def test_a_segment_of_another_layout_than_agreed_is_refused(segment: Segment, agreed: Layout) -> None:
    """Even a sound segment is mapped only if it has the sizes that the handshake granted."""
    fds = _open_fds()
    with pytest.raises(PeerProtocolError, match=f"data_bytes={LAYOUT.data_bytes}.*was agreed"):
        Segment.attach(segment.name, agreed)
    assert _open_fds() == fds


def test_a_segment_shorter_than_its_header_says_is_refused(segment: Segment) -> None:
    """A peer that cut its segment short gets an error instead of making this side die of SIGBUS."""
    os.ftruncate(segment.fd, LAYOUT.total_bytes - 4096)
    fds = _open_fds()
    with pytest.raises(PeerProtocolError, match="contradicts"):
        Segment.attach(segment.name, LAYOUT)
    assert _open_fds() == fds


@pytest.mark.parametrize("data_bytes", [1 << 46, 1 << 60])
def test_too_little_room_is_an_error_at_creation_with_figures(data_bytes: int) -> None:
    """The error names what is free, what was asked for and the remedy, and leaves nothing behind."""
    before, fds = _ours(), _open_fds()
    with pytest.raises(SegmentError, match=r"/dev/shm has [\d.]+ MiB free of [\d.]+ MiB") as caught:
        Segment.create(Layout(data_bytes=data_bytes))
    assert f"{Layout(data_bytes=data_bytes).total_bytes / (1 << 20):.1f} MiB was asked for" in str(caught.value)
    assert "lower arena_bytes" in str(caught.value)
    assert "shmtransport-" not in str(caught.value)
    assert _ours() == before
    assert _open_fds() == fds


@pytest.mark.parametrize("data_bytes", [1 << 63, 1 << 70])
def test_an_impossible_size_leaves_nothing_behind(data_bytes: int) -> None:
    """A size beyond what a file can have is the same error, and its name and file descriptor are gone too."""
    before, fds = _ours(), _open_fds()
    try:
        with pytest.raises(SegmentError):
            Segment.create(Layout(data_bytes=data_bytes))
        assert _ours() == before
        assert _open_fds() == fds
    finally:
        for name in _ours() - before:
            posix_ipc.unlink_shared_memory("/" + name)


def test_no_segment_is_inherited_by_an_executed_program(segment: Segment) -> None:
    """A segment's file descriptor is closed on exec."""
    assert not os.get_inheritable(segment.fd)


def test_an_interrupted_creation_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while pages are being reserved removes the name and closes the file."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupted)
    before, fds = _ours(), _open_fds()
    with pytest.raises(KeyboardInterrupt):
        Segment.create(LAYOUT)
    assert (_ours(), _open_fds()) == (before, fds)


def test_a_segment_that_shrinks_while_it_is_being_mapped_is_the_peers_error(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size was right when it was looked at; mapping looks once more. Nothing stays open."""
    agreed = Layout.from_header

    def shrink(header: bytes, nbytes: int) -> Layout:
        layout = agreed(header, nbytes)
        os.truncate(segment.fd, 4096)
        return layout

    before = _open_fds()
    monkeypatch.setattr(Layout, "from_header", shrink)
    with pytest.raises(PeerProtocolError, match="changed its size"):
        Segment.attach(segment.name, LAYOUT)
    assert _open_fds() == before


def test_a_directory_in_place_of_a_segment_is_the_peers_error() -> None:
    """Whatever stands behind a name of ours: the peer gave it."""
    name = NAME_PREFIX + os.urandom(16).hex()
    os.mkdir(f"/dev/shm{name}")
    try:
        with pytest.raises(PeerProtocolError, match="can't be opened"):
            Segment.attach(name, LAYOUT)
    finally:
        os.rmdir(f"/dev/shm{name}")
