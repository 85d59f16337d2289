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

from shmtransport.bell import NAME_PREFIX, Bell, bell_file, is_bell_name, is_owned, owner_in_name, remove_if_dead
from shmtransport.errors import PeerProtocolError, SegmentError
from tests.conftest import Process

# Makes a bell and says its name; on "fork" leaves it to a child that outlives it.
_OWNER = """
import os, sys, time
from shmtransport.bell import Bell

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


@pytest.fixture
def second_name() -> Iterator[Callable[[str], str]]:
    """Give a bell's file another name, by which no server that starts meanwhile removes it: ``second_name(name)``."""
    made: list[str] = []

    def link(name: str) -> str:
        made.append(f"/dev/shm/test-{name[len(NAME_PREFIX) :]}")
        os.link(bell_file(name), made[-1])
        return made[-1]

    yield link
    for path in made:
        Path(path).unlink(missing_ok=True)


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _ours() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"sem.{NAME_PREFIX[1:]}{os.getpid()}-")}


# --- ringing ----------------------------------------------------------------------------------------------------------


def test_rings_are_counted(bell: Bell) -> None:
    """A new bell is silent; each ring ends one wait, whoever rang, the owner or its peer."""
    assert not bell.take()
    with Bell.open(bell.name) as peer:
        peer.ring()
        bell.ring()
        peer.ring()
        assert [bell.take(), bell.wait(60.0), bell.wait(None), bell.take()] == [True, True, True, False]
        assert not bell.wait(1e-3)


def test_a_ring_wakes_whoever_waits(bell: Bell) -> None:
    """A wait without a time-out ends with the ring of another thread."""
    peer = Bell.open(bell.name)
    later = threading.Timer(0.02, peer.ring)
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
        peer.ring()
        assert stranger.take()
        assert not bell.take()
        peer.ring()
        assert bell.take()


def test_a_bell_that_can_count_no_further_is_still_rung() -> None:
    """A stranger that rings as often as a semaphore can count costs its owner time, and nobody an error."""
    name = f"{NAME_PREFIX}{os.getpid()}-{'0' * 32}"
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=posix_ipc.SEMAPHORE_VALUE_MAX)
    with Bell.open(name) as bell:
        bell.ring()
        assert bell.take()
        bell.unlink()
    semaphore.close()


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_bell_is_private_to_its_user_and_names_its_owner(bell: Bell) -> None:
    """Mode 0600; no two names alike, each of the form that ``open`` accepts, with this process's id in it."""
    found = os.stat(bell_file(bell.name))
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()
    with Bell.create() as other:
        assert other.name != bell.name
        for name in (bell.name, other.name):
            assert is_bell_name(name)
            assert owner_in_name(name) == os.getpid()


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
    assert not is_bell_name(name)
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
        peer.ring()
        assert bell.take()
        bell.unlink()
        peer.unlink()


def test_unlinking_never_removes_another_bell_of_the_same_name(bell: Bell) -> None:
    """A second unlink is no second removal: a name that was made anew in between stays."""
    bell.unlink()
    other = posix_ipc.Semaphore(bell.name, posix_ipc.O_CREX)
    try:
        bell.unlink()
        bell.close()
        assert os.path.exists(bell_file(bell.name))
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


def test_an_abandoned_bell_is_the_parents(bell: Bell) -> None:
    """What a forked child does with it, closing above all, removes nothing; only its copy of the lock is closed."""
    parents_lock = os.dup(bell._lock_fd)  # as after a fork: one lock, two descriptors
    try:
        bell.abandon()
        bell.abandon()
        bell.close()
        assert len(_ours()) == 1
        assert is_owned(bell_file(bell.name))
    finally:
        os.close(parents_lock)
        bell.unlink()
        bell._semaphore.close()


# --- dead owners ------------------------------------------------------------------------------------------------------


def test_a_dead_processs_bell_is_removed_and_a_living_ones_never(
    owner: Callable[..., tuple[Process, str]], second_name: Callable[[str], str]
) -> None:
    """Stopped is alive; killed it is dead at once, whoever rings its bell still."""
    process, name = owner()
    path = second_name(name)
    assert owner_in_name(name) == process.pid
    process.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    for look in (path, bell_file(name)):
        assert is_owned(look)
        assert not remove_if_dead(look)
        assert os.path.exists(look)
    with Bell.open(name) as peer:
        process.signal(signal.SIGKILL)
        process.wait()
        assert not is_owned(path)
        assert remove_if_dead(path)
        assert not os.path.exists(path)
        peer.ring()
    assert not remove_if_dead(path)
    remove_if_dead(bell_file(name))
    assert not os.path.exists(bell_file(name))


def test_a_forked_child_does_not_keep_its_dead_parents_bell(
    owner: Callable[..., tuple[Process, str]], second_name: Callable[[str], str]
) -> None:
    """The child has abandoned it: when the parent ends, the bell is nobody's, however long the child lives."""
    process, name = owner("fork")
    child = int(process.readline())
    path = second_name(name)
    try:
        assert not remove_if_dead(path)
        process.signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # raises if it does not run
        assert remove_if_dead(path)
    finally:
        os.kill(child, signal.SIGKILL)
        remove_if_dead(bell_file(name))


def test_a_bell_of_this_process_is_never_removed(bell: Bell) -> None:
    """Its owner's lock counts within the process, too, and a look at it does not end it."""
    for _ in range(2):
        assert is_owned(bell_file(bell.name))
        assert not remove_if_dead(bell_file(bell.name))
    assert len(_ours()) == 1


def test_a_file_that_is_gone_or_not_ours_is_not_removed(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error either; but one that says that the system is broken is not hidden."""
    assert not remove_if_dead("/dev/shm/sem.no-such-bell")
    path = bell_file(bell.name)
    os.close(bell._lock_fd)
    for number in (errno.ENOENT, errno.EPERM, errno.EACCES):
        monkeypatch.setattr(os, "unlink", _raiser(OSError(number, "")))
        assert not remove_if_dead(path)
    monkeypatch.setattr(os, "unlink", _raiser(OSError(errno.EIO, "")))
    fds = _open_fds()
    with pytest.raises(OSError, match=f"{errno.EIO}"):
        remove_if_dead(path)
    assert _open_fds() == fds
    monkeypatch.undo()
    bell._lock_fd = os.open(path, os.O_RDWR)


def _raiser(error: Exception) -> Callable[..., None]:
    def fail(*_arguments: object, **_keywords: object) -> None:
        raise error

    return fail


# --- making one while others sweep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
@pytest.mark.parametrize("times", [1, 100])
def test_a_bell_that_is_swept_away_while_it_is_made_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, moment: str, times: int
) -> None:
    """A sweeper may take a new bell for a dead one's; whoever makes it notices, and in the end says what is wrong."""
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
            assert is_owned(bell_file(bell.name))
    else:
        with pytest.raises(SegmentError, match="removed at once"):
            Bell.create()
    monkeypatch.undo()
    assert not _ours()
    assert _open_fds() == fds


@pytest.mark.parametrize("module", [posix_ipc, os], ids=["semaphore", "file"])
def test_a_bell_that_can_not_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """No semaphore, or no file descriptor to lock it by: SegmentError with the reason, and no name stays."""
    monkeypatch.setattr(module, "Semaphore" if module is posix_ipc else "open", _raiser(OSError(24, "Too many")))
    with pytest.raises(SegmentError, match=r"can't create a semaphore.*Too many"):
        Bell.create()
    monkeypatch.undo()
    assert not _ours()
