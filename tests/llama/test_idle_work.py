"""Work for pauses: begun when nothing is asked for, left when something is, ended with its owner."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from llama_split.shields import idle
from llama_split.shields.idle import GoOn, IdleWork
from tests.support.helpers import eventually
from tests.support.process import ROOT, Process

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "PAUSE_S", 0.05)


class _Owner:
    """Counts how often its work has begun, ended, and was left; it takes until it is ``enough``, or is left."""

    def __init__(self) -> None:
        self.begun = self.done = self.left = 0
        self.enough = threading.Event()
        self.work = IdleWork(self, _Owner.do, "a test's work")

    def do(self, go_on: GoOn) -> None:
        self.begun += 1
        try:
            while not self.enough.wait(0.001):
                go_on()
        except Exception:
            self.left += 1
            raise
        self.done += 1


@pytest.fixture
def owner() -> Iterator[_Owner]:
    owner = _Owner()
    yield owner
    owner.work.close()
    owner.work._thread.join(20.0)


def test_nothing_is_done_before_something_was_asked_for(owner: _Owner) -> None:
    """Nor again, once it is done: the thread then uses no CPU time."""
    clock = time.pthread_getcpuclockid(owner.work._thread.ident or 0)
    time.sleep(0.2)
    assert owner.begun == 0
    owner.enough.set()
    owner.work.ask()
    assert eventually(lambda: owner.done == 1)
    time.sleep(0.05)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.005
    assert owner.begun == 1


def test_the_work_waits_for_a_pause(owner: _Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thing after another is asked for, it is not begun."""
    monkeypatch.setattr(idle, "PAUSE_S", 1.0)
    asked, longest_s = time.monotonic(), 0.0
    end = asked + 1.5
    while time.monotonic() < end:
        owner.work.ask()
        longest_s, asked = max(longest_s, time.monotonic() - asked), time.monotonic()
        time.sleep(0.01)
    assert owner.begun == 0 or longest_s > 0.9, "it began without a pause"
    assert eventually(lambda: owner.begun == 1)


def test_what_is_asked_for_in_the_middle_ends_it_until_the_next_pause(owner: _Owner) -> None:
    """At its next step; then it is begun again."""
    for turn in range(1, 4):
        owner.work.ask()
        assert eventually(lambda turn=turn: (owner.begun, owner.left) == (turn, turn - 1))  # type: ignore[misc]
    owner.enough.set()
    assert eventually(lambda: owner.done == 1)


def test_the_thread_ends_with_its_owner() -> None:
    """In the middle of a pause or before anything was asked for; closing waits for nothing."""
    owners = [_Owner(), _Owner()]
    threads = [one.work._thread for one in owners]
    owners[0].work.ask()
    owners.clear()
    gc.collect()
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()


def test_work_that_is_under_way_is_left_when_it_is_closed(owner: _Owner) -> None:
    """At its next step."""
    owner.work.ask()
    assert eventually(lambda: owner.begun == 1)
    owner.work.close()
    owner.work._thread.join(20.0)
    assert (owner.left, owner.done) == (1, 0)


def test_work_that_fails_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """With one warning; what asks later is not disturbed."""

    class _Failing:
        def fail(self, _go_on: GoOn) -> None:
            raise MemoryError("no room")

    failing = _Failing()
    with caplog.at_level(logging.WARNING, "llama_split"):
        work = IdleWork(failing, _Failing.fail, "a test's work")
        work.ask()
        work._thread.join(20.0)
        work.ask()
    assert [record.getMessage() for record in caplog.records] == ["a test's work is given up: no room"]


def test_closing_in_the_middle_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the work raises then; nor is a thread that can't be started: then there is no such work."""

    class _Closing:
        def close(self, _go_on: GoOn) -> None:
            work.close()
            raise ValueError("closed")

    closing = _Closing()
    with caplog.at_level(logging.WARNING, "llama_split"):
        work = IdleWork(closing, _Closing.close, "a test's work")
        work.ask()
        work._thread.join(20.0)
    assert not caplog.records


def test_without_a_thread_there_is_no_such_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its owner can be used all the same."""

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    owner = _Owner()
    owner.work.ask()
    owner.work.close()
    assert "given up: can't start new thread" in caplog.text


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_not_hindered(owner: _Owner) -> None:
    """It has no such thread; asking and closing do nothing there."""
    owner.work.ask()
    assert eventually(lambda: owner.begun == 1)
    child = os.fork()
    if child == 0:
        owner.work.ask()
        owner.work.close()
        owner.work._finish()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    owner.enough.set()
    assert eventually(lambda: owner.done == 1)


_ENDING = """
import threading, torch
from llama_split.shields import idle
idle.PAUSE_S = 0.0
begun = threading.Event()
class Owner:
    def work(self, go_on):
        begun.set()
        a = torch.ones(600, 600)
        while True:
            a @ a
            go_on()
owner = Owner()
work = idle.IdleWork(owner, Owner.work, "a test's work")
work.ask()
assert begun.wait(30)
"""


def test_the_interpreter_may_end_in_the_middle() -> None:
    """It waits for the step that the thread is at, and leaves no message."""
    done = subprocess.run(
        [sys.executable, "-c", _ENDING],
        cwd=ROOT,
        env=Process.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
