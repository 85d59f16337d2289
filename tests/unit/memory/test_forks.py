"""Forks: in every child whatever was registered and still lives is abandoned; in the parent nothing is."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from shmtransport.core.layout import Layout
from shmtransport.memory.ownership import registry
from shmtransport.memory.segment import SEGMENTS, Segment
from tests.support.process import Process

# Forks children and grandchildren that say what was abandoned in them.
_FAMILY = """
import os
from shmtransport.memory.ownership import registry

abandoned = []

class Thing:
    def __init__(self, name):
        self.name = name
        registry.abandon_after_fork(self)

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
    monkeypatch.setattr(registry, "_forkables", weakref.WeakSet())


class _Thing:
    def __init__(self) -> None:
        self.abandoned = 0
        registry.abandon_after_fork(self)

    def abandon(self) -> None:
        self.abandoned += 1


def test_each_child_abandons_what_lives_and_its_parent_nothing(directory: Path, spawn: Callable[..., Process]) -> None:
    """Across generations: a thing stays registered in the child, where it may have reconnected."""
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
    registry.abandon_after_fork(thing)
    for fork in (1, 2):
        registry.after_fork()
        assert thing.abandoned == fork


def test_being_registered_keeps_nothing_alive() -> None:
    """An unreferenced connection is collected as if it had never been registered."""
    reference = weakref.ref(_Thing())
    gc.collect()
    assert reference() is None
    registry.after_fork()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_owns_nothing_of_what_its_parent_has_made() -> None:
    """Neither by name nor by descriptor: the locks are the parent's, which the child can ask for."""
    segment = Segment.create(Layout(data_bytes=4096), "client")
    child = os.fork()
    if child == 0:
        owned = registry.role_of(segment.name) is not None or registry.owns_segment(segment.fd)
        os._exit(SEGMENTS.owner_of(segment.name) != os.getppid() or owned)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert registry.role_of(segment.name) == "client"
    assert registry.owns_segment(segment.fd)
    segment.unlink()
    assert registry.role_of(segment.name) is None
    segment.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_in_this_very_process_runs_it_in_the_child_only() -> None:
    """Python calls the hook itself at a fork."""
    thing = _Thing()
    child = os.fork()
    if child == 0:
        os._exit(40 + thing.abandoned)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 41
    assert thing.abandoned == 0
