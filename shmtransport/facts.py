"""What there is to know of this machine and this process's limits, as far as it matters to the transport.

Only collects: what the facts mean is the business of ``doctor``. Environment variables are reported by fixed names, so
that a report can be shown to others without giving a secret away.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from dataclasses import dataclass
from importlib import metadata

import zmq

from .leftovers import SharedObject, list_all
from .version import VERSION

_PACKAGES = ("torch", "numpy", "pyzmq", "posix_ipc", "msgspec")
_VARIABLES = {
    *("LLAMA_IPC_PATH", "LLAMA_MODEL_PATH", "LLAMA_DTYPE", "LLAMA_GPU_DEVICE"),
    *("TMPDIR", "LD_PRELOAD", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"),
}
_VARIABLE_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ (\S+) (\d+) +/dev/shm/shmtransport-[0-9a-f]{32} \(deleted\)$")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class ConnectedSegments:
    """Segments without a name, which are those of connections: as far as this user's processes can be looked into."""

    count: int
    nbytes: int
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Limit:
    """A resource limit; None: unlimited."""

    soft: int | None
    hard: int | None


@dataclass(frozen=True)
class MachineFacts:
    """Sizes in bytes. ``cores`` are those that this process may use; ``named`` is what has a name in /dev/shm."""

    versions: dict[str, str]
    kernel: str
    cores: int
    shm_bytes: int
    shm_free_bytes: int
    connected: ConnectedSegments
    named: tuple[SharedObject, ...]
    open_files: Limit
    locked_memory_bytes: Limit
    environment: dict[str, str]
    huge_pages: str
    """The kernel's rule for shared memory, and what /dev/shm was mounted with."""


def machine_facts() -> MachineFacts:
    """Look at this machine and this process."""
    total, free = shm_room()
    return MachineFacts(
        versions=versions(),
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        shm_bytes=total,
        shm_free_bytes=free,
        connected=connected_segments(),
        named=tuple(list_all()),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory_bytes=_limit(resource.RLIMIT_MEMLOCK),
        environment=environment(os.environ),
        huge_pages=f"{_huge_pages_rule()}, /dev/shm: {_huge_pages_mount()}",
    )


def versions() -> dict[str, str]:
    """Versions of what the transport is made of."""
    found = {"shmtransport": VERSION, "Python": platform.python_version()}
    found.update((package, _version_of(package)) for package in _PACKAGES)
    return {**found, "libzmq": zmq.zmq_version()}


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def shm_room() -> tuple[int, int]:
    """Size of /dev/shm and what is free of it, in bytes; 0 and 0 if there is none."""
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return 0, 0
    return room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize


def environment(variables: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Those variables that override something, sorted by name."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)
    }


def connected_segments() -> ConnectedSegments:
    """Find the segments that processes have mapped and that have no name any more."""
    sizes: dict[tuple[str, str], int] = {}
    processes = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (mapped := mapped_by(entry)):
            processes.append(int(entry))
            for segment, nbytes in mapped.items():
                sizes[segment] = max(sizes.get(segment, 0), nbytes)
    return ConnectedSegments(len(sizes), sum(sizes.values()), tuple(sorted(processes)))


def mapped_by(process: str) -> dict[tuple[str, str], int]:
    """Device and inode of the segments that a process has mapped, with how much of each."""
    found: dict[tuple[str, str], int] = {}
    try:
        with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if (match := _MAPPED.match(line)) is not None:
                    start, end, device, inode = match.groups()
                    found[device, inode] = found.get((device, inode), 0) + int(end, 16) - int(start, 16)
    except OSError:  # it has ended, or is another user's
        return {}
    return found


def _limit(which: int) -> Limit:
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return Limit(soft, hard)


def _huge_pages_rule() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", encoding="utf-8") as file:
            chosen = re.search(r"\[(\w+)\]", file.read())
    except OSError:
        return UNKNOWN
    return UNKNOWN if chosen is None else chosen[1]


def _huge_pages_mount() -> str:
    """The ``huge=`` option of /dev/shm; never, if it was mounted without."""
    try:
        with open("/proc/mounts", encoding="utf-8") as mounts:
            options = [line.split()[3] for line in mounts if line.split()[1] == "/dev/shm"]
    except OSError:
        return UNKNOWN
    found = re.search(r"(?:^|,)huge=(\w+)", options[-1]) if options else None
    return "never" if found is None else found[1]
