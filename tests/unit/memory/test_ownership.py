"""Liveness: the kernel says who owns a segment and when that process has ended."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmtransport.core.layout import Layout
from shmtransport.errors import PeerProtocolError
from shmtransport.memory.owner_lock import holder
from shmtransport.memory.peer_watch import PeerWatch
from shmtransport.memory.segment import SEGMENTS, Segment
from tests.support.process import Process

# Makes a segment as a peer would and says its name; on "fork" leaves it to a child that outlives it.
LAYOUT = Layout(data_bytes=4096, release_slots=8)
_OWNER = """
import os, sys, time
from shmtransport.core.layout import Layout
from shmtransport.memory.segment import Segment

segment = Segment.create(Layout(data_bytes=4096, release_slots=8))
print("ready", flush=True)
print(segment.name, flush=True)
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    os._exit(0)
time.sleep(60)
"""


@pytest.fixture
def owner(directory: Path, spawn: Callable[..., Process]) -> Callable[..., tuple[Process, Segment]]:
    """Start a process that owns a segment; the process, and the segment attached here."""

    def start(*arguments: str) -> tuple[Process, Segment]:
        script = directory / "owner.py"
        script.write_text(_OWNER)
        process = spawn(script, *arguments)
        segment = Segment.attach(process.readline(), LAYOUT)
        segment.unlink_for_owner()
        return process, segment

    return start


@pytest.fixture
def own_segment() -> Iterator[Segment]:
    segment = Segment.create(LAYOUT)
    yield segment
    segment.close()


def _readable(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_an_owner_is_alive_also_when_stopped_until_it_is_killed(
    owner: Callable[..., tuple[Process, Segment]],
) -> None:
    """The lock's holder is the owner's real pid; stopped it is alive; killed it is not, as the pidfd shows."""
    process, segment = owner()
    assert holder(segment.fd) == process.pid
    watch = PeerWatch(segment.fd)
    assert watch.pid == process.pid
    fd = watch.fileno()
    assert fd is not None
    assert watch.alive()

    process.stop()
    assert watch.alive()
    assert holder(segment.fd) == process.pid
    assert not _readable(fd, 0)

    process.signal(signal.SIGKILL)
    assert _readable(fd, 30.0)
    assert not watch.alive()
    assert holder(segment.fd) is None
    with pytest.raises(PeerProtocolError, match="does not hold the lock"):
        PeerWatch(segment.fd)
    watch.close()
    segment.close()


def test_a_forked_child_does_not_inherit_the_ownership(owner: Callable[..., tuple[Process, Segment]]) -> None:
    """When the owner ends, its forked child, with the same file descriptors, doesn't count as the peer."""
    process, segment = owner("fork")
    child = int(process.readline())
    try:
        assert process.wait() == 0
        os.kill(child, 0)  # raises if it does not run
        assert holder(segment.fd) is None
    finally:
        os.kill(child, signal.SIGKILL)
    segment.close()


def test_without_a_pidfd_the_lock_tells(
    owner: Callable[..., tuple[Process, Segment]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a kernel without pidfd_open ``fileno`` is None, and ``alive`` asks for the lock."""

    def missing(_pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    process, segment = owner()
    watch = PeerWatch(segment.fd)
    assert watch.fileno() is None
    assert watch.alive()
    process.signal(signal.SIGKILL)
    process.wait()
    assert not watch.alive()
    watch.close()
    segment.close()


def test_this_process_is_no_other_holder(own_segment: Segment) -> None:
    """A process can't see its own lock: None, and a peer in the same process is alive, with nothing to watch."""
    assert holder(own_segment.fd) is None
    watch = PeerWatch(own_segment.fd)
    assert watch.alive()
    assert watch.fileno() is None
    assert watch.pid == os.getpid()
    watch.close()


def test_a_segment_that_nobody_holds_can_not_be_watched() -> None:
    """Without a lock there is no process to watch, and the connection is refused."""
    fd = os.memfd_create("nobody's")
    try:
        with pytest.raises(PeerProtocolError, match="does not hold the lock"):
            PeerWatch(fd)
    finally:
        os.close(fd)


def test_a_closed_segment_is_no_longer_this_processs_own(own_segment: Segment) -> None:
    """Once its owner has closed it, a segment has no holder, and it can no longer be watched."""
    peer = Segment.attach(own_segment.name, LAYOUT)
    assert PeerWatch(peer.fd).alive()
    own_segment.close()
    with pytest.raises(PeerProtocolError, match="does not hold the lock"):
        PeerWatch(peer.fd)
    peer.close()


def test_holding_twice_is_harmless(own_segment: Segment) -> None:
    """The owner's lock belongs to the process: taking it again neither blocks nor fails."""
    SEGMENTS.claim(own_segment.fd)
    assert holder(own_segment.fd) is None


def test_closing_a_watch_twice_closes_once(owner: Callable[..., tuple[Process, Segment]]) -> None:
    """A closed watch has no file descriptor, and a second close touches none."""
    _process, segment = owner()
    watch = PeerWatch(segment.fd)
    open_before = len(os.listdir("/proc/self/fd"))
    watch.close()
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == open_before - 1
    assert watch.fileno() is None
    segment.close()
