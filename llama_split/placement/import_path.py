"""Keeps the current directory off the import path: files that lie there must not run as code.

Python puts it on the path for ``python -m``, and an empty entry of PYTHONPATH means it too. This project's packages are
found next to this module, so that a checkout works from its own root. This module imports only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PACKAGES = ("llama_split", "shmtransport")


class OwnPackages(MetaPathFinder):
    """Finds this project's packages next to this one, before any others of the same names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT], target) if name in _PACKAGES else None


def leave_current_directory() -> None:
    """Remove the current directory from this process's import path, unless Python or its packages lie there."""
    pythons = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    installed = {*pythons, *site.getsitepackages(), site.getusersitepackages()}
    sys.path[:] = [entry for entry in sys.path if entry in installed or not is_current(entry)]
    if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages())


def without_current_directory(variable: str) -> str:
    """A value of PYTHONPATH without the entries that mean the current directory."""
    return os.pathsep.join(entry for entry in variable.split(os.pathsep) if not is_current(entry))


def is_current(entry: str) -> bool:
    """True if an entry of the import path is the current directory."""
    with contextlib.suppress(OSError, ValueError):
        return not entry or os.path.samefile(entry, os.curdir)
    return False
