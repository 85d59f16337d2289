"""Bells: rings are counted, names vanish with their owner, and a peer can neither be opened by mistake nor harmed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from shmtransport.errors import PeerProtocolError, SegmentError
from shmtransport.memory.bell import BELLS, NAME_PREFIX, Bell
from shmtransport.memory.ownership import registry
from tests.support.process import Process

# Makes a bell and says its name; on "fork" leaves it to a child that outlives it.
_OWNER = """
import os, sys, time
from shmtransport.memory.bell import Bell

bell = Bell.create()
print("ready", flush=True)
print(bell.name, flush=True)
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        bell.abandon()
        print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


@pytest.fixture
def bell() -> Iterator[Bell]:
    with Bell.create() as made:
        yield made


@pytest.fixture
def owner(directory: Path, spawn: Callable[..., Process]) -> Callable[..., tuple[Process, str]]:
    """Start a process that owns a bell; the process, and the bell's name."""

    def start(*arguments: str) -> tuple[Process, str]:
        script = directory / "owner.py"
        script.write_text(_OWNER)
        process = spawn(script, *arguments)
        return process, process.readline()

    return start


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _ours() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"sem.{NAME_PREFIX[1:]}{os.getpid()}-")}


# --- ringing ----------------------------------------------------------------------------------------------------------


def test_rings_are_counted(bell: Bell) -> None:
    """A new bell is silent; each ring ends one wait, whether the owner or its peer rang."""
    assert not bell.take()
    with Bell.open(bell.name) as peer:
        peer.post()
        bell.post()
        peer.post()
        assert [bell.take(), bell.wait(60.0), bell.wait(None), bell.take()] == [True, True, True, False]
        assert not bell.wait(1e-3)


def test_a_ring_wakes_whoever_waits(bell: Bell) -> None:
    """A wait without a time-out ends with the ring of another thread."""
    peer = Bell.open(bell.name)
    later = threading.Timer(0.02, peer.post)
    later.start()
    assert bell.wait(None)
    later.join()
    peer.close()


def test_a_signal_ends_a_wait(bell: Bell) -> None:
    """Otherwise Ctrl-C would be noticed only after the next ring."""
    handled: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda number, _frame: handled.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        assert not bell.wait(None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, previous)
    assert handled == [signal.SIGALRM]


def test_a_stranger_that_takes_rings_away_harms_nobody(bell: Bell) -> None:
    """The ring is gone, as if it had not been; the next one is as good as ever."""
    with Bell.open(bell.name) as peer, Bell.open(bell.name) as stranger:
        peer.post()
        assert stranger.take()
        assert not bell.take()
        peer.post()
        assert bell.take()


def test_a_bell_that_can_count_no_further_is_still_rung() -> None:
    """A stranger that rings as often as a semaphore can count costs its owner time, but causes no error."""
    name = f"{NAME_PREFIX}{os.getpid()}-{'0' * 32}"
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=posix_ipc.SEMAPHORE_VALUE_MAX)
    with Bell.open(name) as bell:
        bell.post()
        assert bell.take()
        bell.unlink()
    semaphore.close()


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_bell_is_private_to_its_user_and_names_its_owner(bell: Bell) -> None:
    """Mode 0600; no two names alike, each of the form that ``open`` accepts, with this process's id in it."""
    found = os.stat(BELLS.file(bell.name))
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()
    with Bell.create() as other:
        assert other.name != bell.name
        for name in (bell.name, other.name):
            assert BELLS.is_name(name)
            assert BELLS.owner_of(name) == os.getpid()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        NAME_PREFIX,
        NAME_PREFIX + "1-" + "a" * 31,
        NAME_PREFIX + "1-" + "a" * 33,
        NAME_PREFIX + "1-" + "A" * 32,
        NAME_PREFIX + "1-" + "a" * 32 + "\n",
        NAME_PREFIX + "-" + "a" * 32,
        NAME_PREFIX + "12345678901-" + "a" * 32,
        NAME_PREFIX + "\u0661-" + "a" * 32,
        NAME_PREFIX + "-1-" + "a" * 32,
        NAME_PREFIX + "1/../1-" + "a" * 32,
        NAME_PREFIX[1:] + "1-" + "a" * 32,
        "/shmtransport-" + "a" * 32,
        "/other-1-" + "a" * 32,
    ],
)
def test_other_names_are_never_opened(name: str) -> None:
    """A peer can't make this side open, and ring, anything but a bell."""
    assert not BELLS.is_name(name)
    with pytest.raises(PeerProtocolError, match="never makes"):
        Bell.open(name)


def test_a_missing_bell_is_the_peers_error(bell: Bell) -> None:
    """A well-formed name of nothing is refused, and the error does not repeat it."""
    bell.unlink()
    with pytest.raises(PeerProtocolError, match="can't be opened") as caught:
        Bell.open(bell.name)
    assert bell.name not in str(caught.value)


def test_an_unlinked_bell_still_rings(bell: Bell) -> None:
    """Once both sides have opened it, the name may go: a kill then leaves nothing behind. A second unlink is none."""
    with Bell.open(bell.name) as peer:
        peer.unlink()
        assert not _ours()
        peer.post()
        assert bell.take()
        bell.unlink()
        peer.unlink()


def test_unlinking_never_removes_another_bell_of_the_same_name(bell: Bell) -> None:
    """A second unlink is no second removal: a name that was recreated in between stays."""
    bell.unlink()
    other = posix_ipc.Semaphore(bell.name, posix_ipc.O_CREX)
    try:
        bell.unlink()
        bell.close()
        assert os.path.exists(BELLS.file(bell.name))
    finally:
        other.close()
        posix_ipc.unlink_semaphore(bell.name)


def test_closing_gives_back_what_was_opened_and_twice_does_nothing() -> None:
    """The owner's name and lock go with it, a peer's close removes no name; file descriptors are as before."""
    fds = _open_fds()
    bell = Bell.create()
    peer = Bell.open(bell.name)
    for _ in range(2):
        peer.close()
        assert len(_ours()) == 1
    for _ in range(2):
        bell.close()
        assert not _ours()
    assert _open_fds() == fds


def test_an_abandoned_bell_is_the_parents(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forked child does with it, closing above all, removes nothing; only its copy of the lock is closed."""
    parents_lock = os.dup(bell._lock_fd)  # as after a fork: one lock, two descriptors, and an empty registry
    monkeypatch.setattr(registry, "_names", {})
    try:
        bell.abandon()
        bell.abandon()
        bell.close()
        bell.unlink()
        assert len(_ours()) == 1
        assert BELLS.owner_of(bell.name) == os.getpid()
    finally:
        os.close(parents_lock)
        BELLS.unlink(bell.name)
        bell._semaphore.close()


# --- dead owners ------------------------------------------------------------------------------------------------------


def test_a_dead_processs_bell_is_removed_and_a_living_ones_never(owner: Callable[..., tuple[Process, str]]) -> None:
    """A stopped owner is alive; a killed one is dead at once, even if its bell still rings."""
    process, name = owner()
    process.stop()
    assert BELLS.owner_of(name) == process.pid
    assert not BELLS.remove_if_dead(name)
    assert os.path.exists(BELLS.file(name))
    with Bell.open(name) as peer:
        process.signal(signal.SIGKILL)
        process.wait()
        assert BELLS.owner_of(name) is None
        assert BELLS.remove_if_dead(name)
        assert not os.path.exists(BELLS.file(name))
        peer.post()
    assert not BELLS.remove_if_dead(name)


def test_a_forked_child_does_not_keep_its_dead_parents_bell(owner: Callable[..., tuple[Process, str]]) -> None:
    """The child has abandoned it: when the parent ends, the bell has no owner, however long the child lives."""
    process, name = owner("fork")
    child = int(process.readline())
    try:
        assert not BELLS.remove_if_dead(name)
        process.signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # raises if it does not run
        assert BELLS.remove_if_dead(name)
    finally:
        os.kill(child, signal.SIGKILL)
        BELLS.remove_if_dead(name)


def test_a_bell_of_this_process_is_never_removed(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner's lock counts within the process, too, and a look at it does not end it."""
    for known in (True, False, False):
        if not known:
            monkeypatch.setattr(registry, "_names", {})
        assert BELLS.owner_of(bell.name) == os.getpid()
        assert not BELLS.remove_if_dead(bell.name)
    assert len(_ours()) == 1


def test_a_file_that_is_gone_or_not_ours_is_not_removed(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error either; but one that says that the system is broken is not hidden."""
    assert not BELLS.remove_if_dead(NAME_PREFIX + "1-" + "0" * 32)
    path = BELLS.file(bell.name)
    monkeypatch.setattr(registry, "_names", {})
    os.close(bell._lock_fd)
    for number in (errno.ENOENT, errno.EPERM, errno.EACCES):
        monkeypatch.setattr(os, "unlink", _raiser(OSError(number, "")))
        assert not BELLS.remove_if_dead(bell.name)
    monkeypatch.setattr(os, "unlink", _raiser(OSError(errno.EIO, "")))
    fds = _open_fds()
    with pytest.raises(OSError, match=f"{errno.EIO}"):
        BELLS.remove_if_dead(bell.name)
    assert _open_fds() == fds
    monkeypatch.undo()
    bell._lock_fd = os.open(path, os.O_RDWR)


def _raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_arguments: object, **_keywords: object) -> None:
        raise error

    return fail


# --- making one while others sweep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
@pytest.mark.parametrize("times", [1, 100])
def test_a_bell_that_is_swept_away_while_it_is_made_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, moment: str, times: int
) -> None:
    """A sweeper may take a new bell for a dead one's; its maker notices, and reports the problem if it goes on."""
    left = [times]
    flock, open_file = fcntl.flock, os.open

    def sweep() -> None:
        if left[0] > 0:
            left[0] -= 1
            (name,) = _ours()
            os.unlink(f"/dev/shm/{name}")

    def swept_open(*arguments: object) -> int:
        sweep()
        return open_file(*arguments)  # type: ignore[arg-type]

    def swept_lock(fd: int, operation: int) -> None:
        sweep()
        flock(fd, operation)

    if moment == "before it is opened":
        monkeypatch.setattr(os, "open", swept_open)
    else:
        monkeypatch.setattr(fcntl, "flock", swept_lock)
    fds = _open_fds()
    if times == 1:
        with Bell.create() as bell:
            assert BELLS.owner_of(bell.name) == os.getpid()
    else:
        with pytest.raises(SegmentError, match="removed at once"):
            Bell.create()
    monkeypatch.undo()
    assert not _ours()
    assert _open_fds() == fds


def test_an_interrupt_while_a_bell_waits_for_its_lock_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a name nor a file descriptor."""
    monkeypatch.setattr(fcntl, "flock", _raiser(KeyboardInterrupt()))
    fds = _open_fds()
    with pytest.raises(KeyboardInterrupt):
        Bell.create()
    assert _open_fds() == fds
    assert not _ours()


@pytest.mark.parametrize("module", [posix_ipc, os], ids=["semaphore", "file"])
def test_a_bell_that_can_not_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """No semaphore, or no file descriptor to lock it by: SegmentError with the reason, and no name stays."""
    monkeypatch.setattr(module, "Semaphore" if module is posix_ipc else "open", _raiser(OSError(24, "Too many")))
    with pytest.raises(SegmentError, match=r"can't create a semaphore.*Too many"):
        Bell.create()
    monkeypatch.undo()
    assert not _ours()
