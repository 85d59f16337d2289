"""Explains why a segment that a peer has named can't be opened: whose fault it is, and what to do."""

from __future__ import annotations

import errno

import posix_ipc

from ..errors import PeerProtocolError, SegmentError

_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


def opening_error(error: Exception) -> PeerProtocolError | SegmentError:
    """The error to raise when the peer's segment could not be opened.

    ``error`` is the system's, or posix_ipc's, which often has a class or a text instead of a number.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, (posix_ipc.ExistentialError, FileNotFoundError)):
        return PeerProtocolError(
            "the peer's segment can't be opened: it is not there; does the peer run in another container?"
        )
    if isinstance(error, posix_ipc.PermissionsError) or number in (errno.EACCES, errno.EPERM):
        return SegmentError(
            "the peer's segment can't be opened: permission denied; do both sides run as the same user?"
        )
    text = reason(error)
    if number in _MACHINE or (isinstance(error, OSError) and number is None) or isinstance(error, MemoryError):
        return SegmentError(
            f"the peer's segment can't be opened: {text}: close files, or raise the limit (ulimit -n), or free memory"
        )
    return PeerProtocolError(f"the peer's segment can't be opened: {text}")


def reason(error: BaseException) -> str:
    """The system's text of an error, without file names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
