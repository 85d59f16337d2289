"""Which twin is used, what each provides, and what a wrong choice is told."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType

import pytest

import shmtransport.core
from shmtransport.core import CONTRACT, choose, python_twin
from tests.support.cores import needs_native


def test_a_twin_provides_the_contract(core: ModuleType) -> None:
    """All names, and of each class all public methods and attributes that the Python twin's has."""
    for name in CONTRACT:
        specified, provided = getattr(python_twin, name), getattr(core, name)
        methods = {member for member, _ in inspect.getmembers(specified, callable) if not member.startswith("_")}
        assert methods <= set(dir(provided))


def test_the_package_uses_the_twin_that_it_names() -> None:
    """CORE tells which one; its names are the package's."""
    twin, name, _ = choose(shmtransport.core.CORE)
    assert name == shmtransport.core.CORE
    assert shmtransport.core.CORE_REASON
    assert all(getattr(shmtransport.core, each) is getattr(twin, each) for each in CONTRACT)


def test_python_can_be_chosen() -> None:
    """Also where there is a compiled core."""
    assert choose("python") == (python_twin, "python", "SHMTRANSPORT_CORE=python")


@needs_native
def test_the_compiled_core_is_the_default_and_can_be_chosen() -> None:
    """Where it was compiled."""
    assert choose("")[1:] == ("native", "it is the default")
    assert choose("native")[1:] == ("native", "SHMTRANSPORT_CORE=native")


@pytest.mark.parametrize("wanted", ["Python", "c", "1"])
def test_an_unknown_choice_is_one_clear_error(wanted: str) -> None:
    """It names the switch and its values."""
    with pytest.raises(ImportError, match=f"^SHMTRANSPORT_CORE={wanted} names no core: set it to python or native"):
        choose(wanted)


def test_without_a_compiled_core_python_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it says why; where the compiled one was asked for, that is one clear error."""
    monkeypatch.setitem(sys.modules, "shmtransport.core.native_twin", None)
    twin, name, why = choose("")
    assert (twin, name) == (python_twin, "python")
    assert why.startswith("the compiled core can't be loaded (")
    assert why.endswith("install shmtransport where there is a C compiler")
    with pytest.raises(
        ImportError, match=r"^SHMTRANSPORT_CORE=native, but the compiled core can't be loaded \(.*unset"
    ):
        choose("native")


@needs_native
def test_a_compiled_core_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was left from an older build, say."""
    from shmtransport.core import _native

    monkeypatch.setattr(_native, "FORMAT_VERSION", 0)
    monkeypatch.delitem(sys.modules, "shmtransport.core.native_twin")
    with pytest.raises(ImportError, match=r"^SHMTRANSPORT_CORE=native.*format version 0, this package"):
        choose("native")


@needs_native
def test_a_second_import_leaves_the_first_ones_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test or a tool imports the package again: what was claimed before is released as ever."""
    from shmtransport.core import _native

    allocator = _native.NextFitAllocator(128)
    block = allocator.claim(64)
    monkeypatch.setattr(shmtransport.core, "_native", _native)
    monkeypatch.delitem(sys.modules, "shmtransport.core._native")
    assert importlib.import_module("shmtransport.core._native") is not _native
    allocator.release(block)
    assert len(allocator) == 0
