"""The compiled core, which the rest of the package can do without; all else stands in pyproject.toml.

Switches, read from the environment of the build:

* ``SHMTRANSPORT_REQUIRE_CORE=1``: a build that can't compile the core fails, rather than warn and go on without it;
* ``SHMTRANSPORT_STRICT_BUILD=1``: the compiler's warnings are errors; for our own builds, since the next compiler may
  warn of something new;
* ``SHMTRANSPORT_SANITIZE=1``: with AddressSanitizer and UndefinedBehaviorSanitizer, see ``make sanitize``.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("shmtransport/core/native")
OLDEST_PYTHON = (3, 10)
HAS_LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a free-threaded Python has none


def _is_on(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def _compiler_options() -> list[str]:
    options = ["-std=c11", "-O2", "-fvisibility=hidden"]
    if _is_on("SHMTRANSPORT_STRICT_BUILD"):
        options += ["-Wall", "-Wextra", "-Werror"]
    if _is_on("SHMTRANSPORT_SANITIZE"):
        options += ["-O1", "-g", "-fno-omit-frame-pointer", *_SANITIZERS]
    return options


_LIMITED = [("Py_LIMITED_API", f"0x{OLDEST_PYTHON[0]:02X}{OLDEST_PYTHON[1]:02X}0000")]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

core = Extension(
    "shmtransport.core._native",
    sources=sorted(map(str, NATIVE.glob("*.c"))),
    depends=sorted(map(str, NATIVE.glob("*.h"))),
    define_macros=_LIMITED if HAS_LIMITED_API else [],
    py_limited_api=HAS_LIMITED_API,
    extra_compile_args=_compiler_options(),
    extra_link_args=_SANITIZERS if _is_on("SHMTRANSPORT_SANITIZE") else [],
    optional=not _is_on("SHMTRANSPORT_REQUIRE_CORE"),
)

tag = {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)} if HAS_LIMITED_API else {}
setup(ext_modules=[core], options={"bdist_wheel": tag})
