"""Adaptive waiting: how long a side looks before it blocks, alike in both twins."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmtransport.core.patience import LOOK_S
from tests.support.cores import native_twin, needs_native, python_twin


@pytest.mark.parametrize("spin_s", [0.0, 0.002])
def test_a_fixed_time_stays(core: ModuleType, spin_s: float) -> None:
    """Whatever the looks have found."""
    patience = core.Patience(spin_s)
    for found in (True, False, False, True):
        assert patience.seconds() == spin_s
        patience.learn(found)


def test_looks_in_vain_become_rare(core: ModuleType) -> None:
    """Twice as rare after each, down to one wait in 257; one that finds something makes each wait look again."""
    patience = core.Patience(None)
    assert patience.seconds() == LOOK_S
    for failure in range(1, 12):
        patience.learn(False)
        passed = 0
        while not patience.seconds():
            passed += 1
        assert passed == min(2**failure, 256)
    patience.learn(True)
    assert [patience.seconds() for _ in range(3)] == [LOOK_S] * 3
    patience.learn(False)
    assert [patience.seconds() > 0 for _ in range(3)] == [False, False, True]


@needs_native
@given(st.lists(st.sampled_from(["seconds", "found", "in vain"]), max_size=60))
def test_both_twins_wait_alike(steps: list[str]) -> None:
    """After any looks."""
    assert native_twin is not None
    one, other = python_twin.Patience(None), native_twin.Patience(None)
    for step in steps:
        if step == "seconds":
            assert one.seconds() == other.seconds()
        else:
            one.learn(step == "found")
            other.learn(step == "found")
