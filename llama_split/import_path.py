"""Keeps the current directory out of what is imported: files that lie there must not run as code.

Python puts it on the path for ``python -m``, and an empty entry of PYTHONPATH means it too. This project's own packages
are found where this module is, so that a checkout works from its own root. Nothing here imports more than Python's own
modules.
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGES = ("llama_split", "shmtransport")


class OwnPackages(MetaPathFinder):
    """Finds this project's packages beside this one, whatever else has their names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT], target) if name in _PACKAGES else None


def leave_current_directory() -> None:
    """Take the current directory off this process's import path, unless Python itself or its packages lie there."""
    pythons = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    installed = {*pythons, *site.getsitepackages(), site.getusersitepackages()}
    sys.path[:] = [entry for entry in sys.path if entry in installed or not is_current(entry)]
    if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages())


def without_current_directory(variable: str) -> str:
    """A value of PYTHONPATH less its entries that mean the current directory."""
    return os.pathsep.join(entry for entry in variable.split(os.pathsep) if not is_current(entry))


def is_current(entry: str) -> bool:
    """Whether an entry of the import path is the current directory."""
    with contextlib.suppress(OSError, ValueError):
        return not entry or os.path.samefile(entry, os.curdir)
    return False
