"""POSIX shared memory: makes segments, attaches a peer's, and unlinks them; knows nothing of tensors.

Rules that it keeps:

* segments have mode 0600, and random names (see ``named_object``);
* every page is reserved at creation, so that a too small /dev/shm is an error here and never a SIGBUS later;
* the owner holds a record lock on its segment until it closes it or its process ends: the kernel tells the peer who
  that is (see ``peer_watch``). A forked child does not inherit it;
* no exit handler unlinks a segment. Its name is removed as soon as both sides have it mapped, by its owner or on behalf
  of an owner that is known for sure. From then on a killed process leaves nothing behind. What one has left before
  that can be removed by anyone who finds the lock free.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import NamedTuple

import posix_ipc

from ..core.layout import HEADER, PAGE_BYTES, Layout
from ..errors import PeerProtocolError, SegmentError
from ..units import size_text
from .mapped_file import map_file, mapping_of, was_cut
from .named_object import DIRECTORY, NamedObjects
from .opening import opening_error, reason
from .ownership import Role, registry

NAME_PREFIX = "/shmtransport-"
SEGMENTS = NamedObjects("segment", NAME_PREFIX)
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # mman.h; Python has no names for them


class Segment:
    """One mapped segment.

    ``view`` covers all of its bytes; slices of it keep the mapping alive, also after ``close``.
    """

    def __init__(self, name: str, fd: int, layout: Layout, *, owned: bool) -> None:
        self.name = name
        self.fd = fd
        self.layout = layout
        self.owned = owned
        self._linked = owned
        self.view = map_file(fd, layout.total_bytes)

    @property
    def was_cut(self) -> bool:
        """Whether the peer has cut the file short, and this process has seen that; False where it can't be known."""
        return was_cut(self.view)

    @property
    def message_ring(self) -> memoryview:
        """The bytes of its message ring."""
        start = self.layout.message_ring_offset
        return self.view[start : start + self.layout.message_ring_bytes]

    @property
    def data(self) -> memoryview:
        """The bytes of its data area."""
        start = self.layout.data_offset
        return self.view[start : start + self.layout.data_bytes]

    @classmethod
    def create(cls, layout: Layout, role: Role = "") -> Segment:
        """Make a new segment with this layout and write its header.

        Args:
            layout: the sizes of its areas.
            role: the side of the connection that it is made for.

        Raises:
            SegmentError: /dev/shm has too little room, or no shared memory can be had.
        """
        if layout.total_bytes > sys.maxsize:
            raise SegmentError(_no_room(layout, OSError(errno.EFBIG, "")))
        segment = SEGMENTS.create(lambda name: cls._make(name, layout), role)
        segment.view[: HEADER.size] = layout.header()
        return segment

    @classmethod
    def _make(cls, name: str, layout: Layout) -> Segment | None:
        """A new segment of this name; None if it was removed between its making and its locking."""
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=layout.total_bytes)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise SegmentError(f"can't create a shared-memory segment: {reason(error)}") from error
        try:
            if SEGMENTS.claim(memory.fd):
                registry.add_segment(memory.fd)
                os.posix_fallocate(memory.fd, 0, layout.total_bytes)
                return cls(name, memory.fd, layout, owned=True)
        except BaseException as error:  # Ctrl-C included: reserving takes a while
            registry.drop_segment(memory.fd)
            os.close(memory.fd)
            if isinstance(error, OSError):
                raise SegmentError(_no_room(layout, error)) from error
            raise
        os.close(memory.fd)
        return None

    @classmethod
    def attach(cls, name: str, layout: Layout) -> Segment:
        """Map a peer's segment, which must have this layout.

        Nothing is mapped before the segment's size and header are known to be right.

        Raises:
            PeerProtocolError: the name is not a segment's, nothing is there, or size or header are not as agreed.
            SegmentError: it can't be mapped.
        """
        if not SEGMENTS.is_name(name):
            raise PeerProtocolError("the peer gave a segment name that this protocol never makes")
        try:
            memory = posix_ipc.SharedMemory(name)
        except (OSError, ValueError, posix_ipc.Error) as error:  # ValueError: it is a directory
            raise opening_error(error) from error
        try:
            found = Layout.from_header(os.pread(memory.fd, HEADER.size, 0), os.fstat(memory.fd).st_size)
            if found != layout:
                raise PeerProtocolError(f"the peer's segment has {found}; {layout} was agreed")
            return cls(name, memory.fd, layout, owned=False)
        except BaseException as error:
            os.close(memory.fd)
            if isinstance(error, OSError):
                raise SegmentError(f"the peer's segment can't be mapped: {reason(error)}") from error
            if isinstance(error, ValueError):  # mmap has looked at the size again
                raise PeerProtocolError("the peer's segment changed its size while it was being mapped") from error
            raise

    def prefault(self) -> None:
        """Enter every page into this process's page table now, rather than one by one on first use."""
        try:
            mapping_of(self.view).madvise(_MADV_POPULATE_WRITE if self.owned else _MADV_POPULATE_READ)
        except OSError:  # a kernel before 5.14
            self.view[::PAGE_BYTES].tobytes()

    def abandon(self) -> None:
        """In a forked child: forget the parent's segment; tensors that look into it stay valid here as well."""
        self._linked = self.owned = False

    def unlink(self) -> None:
        """Remove the name, if this process owns it; the memory lives until both sides have unmapped it."""
        if self._linked:
            self._linked = False
            SEGMENTS.unlink(self.name)

    def unlink_for_owner(self) -> None:
        """Remove the name of a peer's segment, which the peer is known to own."""
        SEGMENTS.unlink(self.name)

    def close(self) -> None:
        """Drop the name and this object's mapping; tensors that still look into it keep it alive."""
        self.unlink()
        if self.fd >= 0:
            if self.owned:
                registry.drop_segment(self.fd)
            self.view = memoryview(b"")
            os.close(self.fd)
            self.fd = -1


class Room(NamedTuple):
    """Size of /dev/shm, and what is free of it."""

    total_bytes: int
    free_bytes: int


def shared_memory_room() -> Room:
    """Look how much shared memory this machine has.

    Raises:
        SegmentError: it has none.
    """
    try:
        room = os.statvfs(DIRECTORY)
    except FileNotFoundError as error:
        raise SegmentError(f"{DIRECTORY} is missing: mount a tmpfs there") from error
    except OSError as error:
        raise SegmentError(f"can't look at {DIRECTORY}: {reason(error)}") from error
    return Room(room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize)


def _no_room(layout: Layout, error: OSError) -> str:
    needed = size_text(layout.total_bytes)
    if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EINVAL):
        return f"can't reserve {needed} of shared memory: {reason(error)}"
    total_bytes, free_bytes = shared_memory_room()
    return (
        f"{DIRECTORY} has {size_text(free_bytes)} free of {size_text(total_bytes)}; a segment of {needed} was asked "
        "for: lower arena_bytes, or enlarge it (mount -o remount,size=… /dev/shm; docker run --shm-size=…)"
    )
