"""A stand-in for NVIDIA's driver library, for tests on machines without a GPU.

A test builds the library into a folder and starts a process with ``environment(folder, ...)``: there ``cuda.bindings``
and ``cuda.core`` find it in place of NVIDIA's. In that process ``leaks()``, ``counter()`` and ``calls()`` tell what the
driver holds and what was called, and ``configure()`` changes a setting.

It is stricter than a GPU. An asynchronous copy poisons its destination when it is queued (0xDB), is carried out late,
and reads its source only then; new device memory is 0xCD when its allocation's turn comes in the stream, freed memory
0xDD. The files' opening comments state the rest. Settings, each a variable ``FAKE_CUDA_...``:

* ``delay_us``: how late a copy is carried out, after its turn came (2000)
* ``stall``: copies are never carried out
* ``fail``: ``"cuMemPoolCreate=801,cuEventRecord=2@3"``: these calls answer this code, the latter its third call only
* ``sticky``: from this function's next call on every call answers CUDA_ERROR_ILLEGAL_ADDRESS (700)
* ``devices`` (1), ``uuid`` (32 hexadecimal digits for each, with commas), ``device_bytes``, ``register_limit``,
  ``driver_version`` (13000)
* ``report``: a file that all counters are written into when the process ends
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
_NAME = "libcuda.so.1"
_UNKNOWN = 2**64 - 1
_FLAGS = ["-O1", "-g", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{_NAME}", "-pthread"]


def compiler() -> str | None:
    """The C compiler's path, if there is one."""
    return shutil.which("cc")


def build(folder: Path) -> Path:
    """Compile the library into this folder; returns its path."""
    library = folder / _NAME
    sources = sorted(str(source) for source in _HERE.glob("*.c"))
    command = [compiler() or "cc", *_FLAGS, *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"the stand-in does not compile: {done.stderr}")
    return library


def environment(folder: Path, **settings: str | int) -> dict[str, str]:
    """This process's environment, for a process that shall find the library in this folder, with these settings.

    The process can import ``tests.support`` as well.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FAKE_CUDA_")}
    for name, first in (("LD_LIBRARY_PATH", folder), ("PYTHONPATH", _ROOT)):
        kept[name] = os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))
    return kept | {f"FAKE_CUDA_{name.upper()}": str(_plain(value)) for name, value in settings.items()}


def report(path: Path) -> dict[str, int]:
    """All counters of a process that has ended, which had the setting ``report=path``."""
    pairs = (line.rsplit(" ", 1) for line in path.read_text().splitlines())
    return {name: int(value) for name, value in pairs}


# The rest is for the process that has loaded the library.


@dataclass(frozen=True)
class Leaks:
    """What the driver still holds for this process."""

    streams: int
    events: int
    pools: int
    device_bytes: int
    imported_bytes: int
    registered_bytes: int
    host_bytes: int

    def __bool__(self) -> bool:
        return any(astuple(self))


def leaks() -> Leaks:
    """What is created and not destroyed, allocated and not freed, registered and not unregistered."""
    return Leaks(**{name: counter(name) for name in Leaks.__dataclass_fields__})


def counter(name: str) -> int:
    """One counter, such as ``async_copies``: counters.c lists them."""
    value = int(_library().fake_cuda_counter(name.encode()))
    if value == _UNKNOWN:
        raise KeyError(name)
    return value


def calls(function: str) -> int:
    """How often a function was called, named without ``_v2``."""
    return counter(f"calls:{function}")


def configure(name: str, value: str | int) -> None:
    """Change a setting now: ``configure("stall", 0)``."""
    if not _library().fake_cuda_configure(name.upper().encode(), str(_plain(value)).encode()):
        raise ValueError(f"{name}={value}")


def _plain(value: str | int) -> str | int:
    return int(value) if isinstance(value, bool) else value


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_NAME)
    library.fake_cuda_counter.restype = ctypes.c_ulonglong
    library.fake_cuda_counter.argtypes = [ctypes.c_char_p]
    library.fake_cuda_configure.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    return library
