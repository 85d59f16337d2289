"""Forks: in every child whatever was registered and still lives is abandoned; in the parent nothing is."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from shmtransport import forks
from tests.conftest import Process

# Forks children and grandchildren that say what was abandoned in them.
_FAMILY = """
import os
from shmtransport.forks import abandon_after_fork

abandoned = []

class Thing:
    def __init__(self, name):
        self.name = name
        abandon_after_fork(self)

    def abandon(self):
        abandoned.append(self.name)

def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    os.waitpid(child, 0)

def say(who):
    print(who, sorted(abandoned), flush=True)

def generations():
    say("child")
    made_here = Thing("the child's")
    in_child(lambda: say("grandchild"))
    say("child again")

print("ready", flush=True)
living, dead = Thing("living"), Thing("dead")
del dead
in_child(generations)
in_child(lambda: say("second child"))
say("parent")
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register nothing where a fork of another test would find it, and abandon nothing of theirs."""
    monkeypatch.setattr(forks, "_registered", weakref.WeakSet())


class _Thing:
    def __init__(self) -> None:
        self.abandoned = 0
        forks.abandon_after_fork(self)

    def abandon(self) -> None:
        self.abandoned += 1


def test_each_child_abandons_what_lives_and_its_parent_nothing(directory: Path, spawn: Callable[..., Process]) -> None:
    """Down the generations: a thing stays registered in the child, where it may have connected anew."""
    script = directory / "family.py"
    script.write_text(_FAMILY)
    family = spawn(script)
    assert [family.readline() for _ in range(5)] == [
        "child ['living']",
        """grandchild ['living', 'living', "the child's"]""",
        "child again ['living']",
        "second child ['living']",
        "parent []",
    ]
    assert family.wait() == 0


def test_a_thing_that_was_registered_twice_is_abandoned_once_a_fork() -> None:
    """However often it was registered."""
    thing = _Thing()
    forks.abandon_after_fork(thing)
    for fork in (1, 2):
        forks._abandon_all()
        assert thing.abandoned == fork


def test_being_registered_keeps_nothing_alive() -> None:
    """A connection that nobody holds is collected as if it had never been registered."""
    reference = weakref.ref(_Thing())
    gc.collect()
    assert reference() is None
    forks._abandon_all()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_in_this_very_process_runs_it_in_the_child_only() -> None:
    """The hook is Python's own: nobody has to call it."""
    thing = _Thing()
    child = os.fork()
    if child == 0:
        os._exit(40 + thing.abandoned)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 41
    assert thing.abandoned == 0
