"""Why a peer's segment can't be opened is told by its true cause, and as the fault of whose it is."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator

import posix_ipc
import pytest

from shmtransport.core.layout import Layout
from shmtransport.errors import PeerProtocolError, SegmentError, TransportError
from shmtransport.memory.opening import opening_error
from shmtransport.memory.segment import Segment

_LAYOUT = Layout(data_bytes=4096)


def _open_segment(name: str) -> None:
    Segment.attach(name, _LAYOUT).close()


@pytest.fixture
def opened() -> Iterator[Callable[[], None]]:
    """Open what a peer has made under its name."""
    segment = Segment.create(_LAYOUT)
    yield lambda: _open_segment(segment.name)
    segment.close()


@contextlib.contextmanager
def _no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_are_named(opened: Callable[[], None]) -> None:
    """It is this machine's limit, not another container."""
    with _no_descriptor_left(), pytest.raises(SegmentError) as caught:
        opened()
    assert "files open" in str(caught.value)
    assert "container" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_missing_permissions_are_named(opened: Callable[[], None]) -> None:
    """As for a process of another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            opened()
        except TransportError as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert said.startswith("SegmentError")
    assert "permission denied; do both sides run as the same user?" in said


def test_only_what_is_not_there_may_be_in_another_container() -> None:
    """The one cause that the question fits."""
    with pytest.raises(PeerProtocolError, match=r"is not there; does the peer run in another container\?"):
        _open_segment(f"/shmtransport-{'0' * 32}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (posix_ipc.ExistentialError("gone"), PeerProtocolError),
        (FileNotFoundError(2, "No such file or directory", "/secret"), PeerProtocolError),
        (posix_ipc.PermissionsError("no"), SegmentError),
        (PermissionError(13, "Permission denied"), SegmentError),
        (OSError("This process already has the maximum number of files open"), SegmentError),
        (OSError(23, "Too many open files in system"), SegmentError),
        (OSError(12, "Cannot allocate memory"), SegmentError),
        (MemoryError("no memory"), SegmentError),
        (IsADirectoryError(21, "Is a directory"), PeerProtocolError),
        (OSError(40, "Too many levels of symbolic links"), PeerProtocolError),
        (ValueError("Invalid parameter(s)"), PeerProtocolError),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_each_cause_is_told_by_its_own_words(error: Exception, kind: type[TransportError]) -> None:
    """Whose fault it is decides the class; no file name is told."""
    told = opening_error(error)
    assert type(told) is kind
    assert str(told).startswith("the peer's segment can't be opened: ")
    assert "secret" not in str(told)
    assert ("container" in str(told)) == isinstance(error, (posix_ipc.ExistentialError, FileNotFoundError))
