"""Creates, attaches and unlinks POSIX shared memory; knows nothing of tensors.

Rules that it keeps:

* names are random (128 bits) and segments have mode 0600;
* every page is reserved at creation, so that a too small /dev/shm is an error here and never a SIGBUS later;
* whoever creates a segment holds a POSIX record lock on it until the process ends: the kernel tells the peer who
  that is (see ``liveness``). A forked child does not inherit it;
* nothing is unlinked by an exit handler: a segment is unlinked as soon as both sides have it mapped, by its owner, or
  for an owner that is known for sure. From
  then on a killed process leaves nothing behind. What one has left before that can be removed by anyone who finds
  the lock free, and by nobody else;
* nobody looks at a segment of its own process by name: closing that descriptor would end the owner's lock.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import sys

import posix_ipc

from . import liveness
from .errors import PeerProtocolError, SegmentError
from .layout import HEADER, PAGE_BYTES, Layout
from .opening import opening_error, reason
from .units import size_text

NAME_PREFIX = "/shmtransport-"
_NAME = re.compile(rf"{NAME_PREFIX}[0-9a-f]{{32}}")
_MAKING_ATTEMPTS = 10
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # mman.h; Python has no names for them

_named_here: set[str] = set()
"""Segments that this process has made, from just before they have a name until they have none any more."""
os.register_at_fork(after_in_child=_named_here.clear)


def is_segment_name(name: str) -> bool:
    """Whether a peer's string has the form of a segment's name; anything else is never opened."""
    return _NAME.fullmatch(name) is not None


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
        self._map = mmap.mmap(fd, layout.total_bytes)
        self.view = memoryview(self._map)

    @classmethod
    def create(cls, layout: Layout) -> Segment:
        """Make a new segment with this layout and write its header.

        Raises:
            SegmentError: /dev/shm has too little room, or shared memory is not to be had.
        """
        if layout.total_bytes > sys.maxsize:
            raise SegmentError(_no_room(layout, OSError(errno.EFBIG, "")))
        for _ in range(_MAKING_ATTEMPTS):
            segment = cls._make(NAME_PREFIX + secrets.token_hex(16), layout)
            if segment is not None:
                segment.view[: HEADER.size] = layout.header()
                return segment
        raise SegmentError("every segment that was made was removed at once: does something sweep /dev/shm?")

    @classmethod
    def _make(cls, name: str, layout: Layout) -> Segment | None:
        """A new segment of this name; None if it was swept away between its making and its locking."""
        _named_here.add(name)
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=layout.total_bytes)
        except (OSError, ValueError, posix_ipc.Error) as error:
            _unlink(name)
            raise SegmentError(f"can't create a shared-memory segment: {reason(error)}") from error
        try:
            if liveness.claim_ownership(memory.fd):
                os.posix_fallocate(memory.fd, 0, layout.total_bytes)
                return cls(name, memory.fd, layout, owned=True)
        except BaseException as error:  # Ctrl-C included: reserving takes a while
            liveness.end_ownership(memory.fd)
            os.close(memory.fd)
            _unlink(name)
            if isinstance(error, OSError):
                raise SegmentError(_no_room(layout, error)) from error
            raise
        os.close(memory.fd)
        _unlink(name)
        return None

    @classmethod
    def attach(cls, name: str, layout: Layout) -> Segment:
        """Map a peer's segment, which must have this layout.

        Nothing is mapped before the segment's size and header are known to be right.

        Raises:
            PeerProtocolError: the name is none of ours, nothing is there, or size or header are not as agreed.
            SegmentError: it can't be mapped.
        """
        if not is_segment_name(name):
            raise PeerProtocolError("the peer gave a segment name that this protocol never makes")
        try:
            memory = posix_ipc.SharedMemory(name)
        except (OSError, ValueError, posix_ipc.Error) as error:  # ValueError: it is a directory
            raise opening_error("segment", error) from error
        try:
            found = Layout.from_header(os.pread(memory.fd, HEADER.size, 0), os.fstat(memory.fd).st_size)
            if found != layout:
                raise PeerProtocolError(f"the peer's segment has {found}; {layout} was agreed")
            return cls(name, memory.fd, layout, owned=False)
        except BaseException as error:
            os.close(memory.fd)
            if isinstance(error, OSError):
                raise SegmentError(f"the peer's segment can't be mapped: {reason(error)}") from error
            if isinstance(error, ValueError):  # mmap has looked at the size once more
                raise PeerProtocolError("the peer's segment changed its size while it was being mapped") from error
            raise

    def prefault(self) -> None:
        """Enter every page into this process's page table now, rather than one by one on first use."""
        try:
            self._map.madvise(_MADV_POPULATE_WRITE if self.owned else _MADV_POPULATE_READ)
        except OSError:  # a kernel before 5.14
            self.view[::PAGE_BYTES].tobytes()

    def abandon(self) -> None:
        """In a forked child: forget the parent's segment; tensors that look into it stay valid here as well."""
        self._linked = self.owned = False

    def unlink(self) -> None:
        """Remove the name, if this process owns it; the memory lives until both sides have unmapped it."""
        if self._linked:
            self._linked = False
            _unlink(self.name)

    def unlink_for_owner(self) -> None:
        """Remove the name of a peer's segment, which the peer is known to own."""
        _unlink(self.name)

    def close(self) -> None:
        """Drop the name and this object's mapping; tensors that still look into it keep it alive."""
        self.unlink()
        if self.fd >= 0:
            if self.owned:
                liveness.end_ownership(self.fd)
            self.view = memoryview(b"")
            del self._map
            os.close(self.fd)
            self.fd = -1


def _unlink(name: str) -> None:
    with contextlib.suppress(posix_ipc.ExistentialError):  # the peer, which unlinks as well, was faster
        posix_ipc.unlink_shared_memory(name)
    _named_here.discard(name)


def owner_of(name: str) -> int | None:
    """The process that owns the segment of this name; None if it is dead.

    0 or a negative number: it lives where this process can't see it (another pid namespace).

    Raises:
        OSError: nothing is there any more, or it is another user's.
    """
    if name in _named_here:
        return os.getpid()
    fd = _open(name)
    try:
        return liveness.holder(fd)
    finally:
        os.close(fd)


def remove_if_dead(name: str) -> bool:
    """Remove the segment of this name if no living process owns it; whether it was removed.

    While the name is removed nobody can become the owner: a segment that is just being made is either left alone, or
    its maker finds it gone and makes another.
    """
    if name in _named_here:
        return False
    try:
        fd = _open(name)
    except OSError:  # gone meanwhile, or another user's
        return False
    try:
        if not liveness.keep_claims_out(fd) or liveness.holder(fd) is not None:
            return False
        os.unlink(segment_file(name))
    except (FileNotFoundError, PermissionError):
        return False
    finally:
        os.close(fd)
    return True


def segment_file(name: str) -> str:
    """Where Linux keeps the segment of this name."""
    return f"/dev/shm{name}"


def _open(name: str) -> int:
    return os.open(segment_file(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def shared_memory_bytes() -> int:
    """The size of /dev/shm.

    Raises:
        SegmentError: there is none.
    """
    try:
        shm = os.statvfs("/dev/shm")
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise SegmentError("/dev/shm is missing: mount a tmpfs there") from error
        raise SegmentError(f"/dev/shm can't be looked at: {reason(error)}") from error
    return shm.f_blocks * shm.f_frsize


def _no_room(layout: Layout, error: OSError) -> str:
    needed = size_text(layout.total_bytes)
    if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EINVAL):
        return f"can't reserve {needed} of shared memory: {reason(error)}"
    room = os.statvfs("/dev/shm")
    return (
        f"/dev/shm has {size_text(room.f_bavail * room.f_frsize)} free of {size_text(room.f_blocks * room.f_frsize)}; "
        f"a segment of {needed} was asked for: "
        "lower arena_bytes, or enlarge it (mount -o remount,size=… /dev/shm; docker run --shm-size=…)"
    )
