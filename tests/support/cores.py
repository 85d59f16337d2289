"""Both twins of the core, side by side, whichever of them the package itself uses."""

from __future__ import annotations

from types import ModuleType

import pytest

from shmtransport.core import choose, python_twin

native_twin: ModuleType | None
try:
    native_twin = choose("native")[0]
except ImportError:
    native_twin = None

needs_native = pytest.mark.skipif(native_twin is None, reason="the compiled core is not there")
CORES = (pytest.param(python_twin, id="python"), pytest.param(native_twin, id="native", marks=needs_native))
