"""Bells: each post ends one wait, a peer can neither take away nor undo another's, and old kernels can wait as well."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from shmtransport.core import python_twin
from tests.support.cores import native_twin, needs_native
from tests.support.process import ROOT, Process
from tests.support.rings import POSTS, Forger, RingPair

LARGEST = 60
LONG_S = 30.0  # a wait that takes as long has missed its post

MakeRings = Callable[..., RingPair]


@pytest.fixture
def make_rings() -> Iterator[MakeRings]:
    made: list[RingPair] = []

    def make(*cores: ModuleType) -> RingPair:
        made.append(RingPair(LARGEST, *cores))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


def _later(act: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(0.02, act)
    timer.start()
    return timer


def test_a_post_that_comes_first_keeps_the_wait_from_blocking(core: ModuleType, make_rings: MakeRings) -> None:
    """Its own or a peer's; as many as there were are one, and the wait after that blocks."""
    bell, pair = core.Bell(), make_rings(core)
    assert not bell.wait((pair.b,), 1e-3)
    for post in (bell.post, pair.a.end):
        for _ in range(3):
            post()
        assert bell.wait((pair.b,), LONG_S)
        assert not bell.wait((pair.b,), 1e-3)


def test_a_post_wakes_the_thread_that_waits(core: ModuleType, make_rings: MakeRings) -> None:
    """By another thread, by the only ring and by one of several."""
    bell, pairs = core.Bell(), [make_rings(core) for _ in range(3)]
    rings = tuple(pair.b for pair in pairs)
    for waited, post in (((), bell.post), (rings[:1], pairs[0].a.end), (rings, pairs[1].a.end), (rings, bell.post)):
        timer = _later(post)
        assert bell.wait(waited, LONG_S)
        timer.join()


@needs_native
@pytest.mark.parametrize("names", [("python", "native"), ("native", "python")])
def test_the_twins_wake_each_other(names: tuple[str, str], make_rings: MakeRings) -> None:
    """Whichever of them waits."""
    twins = {"python": python_twin, "native": native_twin}
    one, other = (twins[name] for name in names)
    assert one is not None
    assert other is not None
    pair, bell = make_rings(one, other), other.Bell()
    pair.b.sleep(True)
    timer = _later(lambda: pair.a.write(b"message"))
    assert bell.wait((pair.b,), LONG_S)
    timer.join()
    assert pair.b.read() == b"message"


def test_a_message_posts_a_peer_only_if_that_sleeps(core: ModuleType, make_rings: MakeRings) -> None:
    """The side that is awake finds it by looking, and no system call is made for it."""
    bell, pair = core.Bell(), make_rings(core)
    pair.a.write(b"first")
    assert not bell.wait((pair.b,), 0.0)
    pair.b.sleep(True)
    pair.a.write(b"second")
    assert bell.wait((pair.b,), 0.0)
    pair.b.sleep(False)
    pair.a.write(b"third")
    assert not bell.wait((pair.b,), 0.0)


@pytest.mark.parametrize("forged", [0, 6, 8, 2**32 + 7, 2**64 - 1])
def test_a_peer_can_not_hide_what_another_has_posted(core: ModuleType, make_rings: MakeRings, forged: int) -> None:
    """Each counts in its own segment: whatever one writes there, another's post ends the wait."""
    bell, hostile, innocent = core.Bell(), make_rings(core), make_rings(core)
    forger = Forger(hostile.segment_a, hostile.capacity)
    forger.set_cell(POSTS, 7)
    rings = (hostile.b, innocent.b)
    assert bell.wait(rings, LONG_S)

    def post() -> None:
        innocent.a.end()
        forger.set_cell(POSTS, forged)

    timer = _later(post)
    assert bell.wait(rings, LONG_S)
    timer.join()


def test_a_wait_ends_at_its_time(core: ModuleType, make_rings: MakeRings) -> None:
    """Not much earlier, unless there is a post; negative times are none."""
    bell, pair = core.Bell(), make_rings(core)
    for rings in ((), (pair.b,)):
        started = time.monotonic()
        assert not bell.wait(rings, 0.05)
        assert 0.04 < time.monotonic() - started < LONG_S
        assert not bell.wait(rings, -1.0)


def test_a_signal_ends_a_wait(core: ModuleType, make_rings: MakeRings) -> None:
    """Its handler runs at once; what that raises ends the wait with it."""
    bell, pair = core.Bell(), make_rings(core)
    handled: list[int] = []

    def handle(number: int, _frame: object) -> None:
        handled.append(number)
        if len(handled) == 2:
            raise InterruptedError

    previous = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert not bell.wait((pair.b,), LONG_S)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(InterruptedError):
            bell.wait((pair.b,), LONG_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    assert handled == [signal.SIGALRM] * 2


def test_more_rings_than_the_kernel_waits_for_are_waited_for(core: ModuleType, make_rings: MakeRings) -> None:
    """The post of the last of them is found as well."""
    bell, pairs = core.Bell(), [make_rings(core) for _ in range(130)]
    rings = tuple(pair.b for pair in pairs)
    assert not bell.wait(rings, 1e-4)
    for pair in (pairs[0], pairs[-1]):
        timer = _later(pair.a.end)
        deadline = time.monotonic() + LONG_S
        while not bell.wait(rings, LONG_S):
            assert time.monotonic() < deadline
        timer.join()


@pytest.mark.parametrize("refusal", ["ENOSYS", "EPERM"])
@pytest.mark.parametrize("name", ["python", pytest.param("native", marks=needs_native)])
def test_without_the_call_that_waits_for_several_words_nothing_is_missed(name: str, refusal: str) -> None:
    """On Linux before 5.16, or in a container that forbids it: calls by doorbell are answered all the same."""
    script = ROOT / "tests/support/processes/without_waitv.py"
    environment = {**Process.environment(), "SHMTRANSPORT_CORE": name}
    done = subprocess.run(
        [sys.executable, script, refusal], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert (done.stdout, done.stderr) == ("posted by a peer\nposted by itself\nnot posted\nin time\n", "")
