"""Facts about this machine and this process's limits that matter to the transport.

This module only collects facts; ``doctor`` judges them. It reports environment variables of fixed names, and any whose
value is an ``ipc://`` address, so a report can be shown to others without revealing a secret.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..channels.address import IPC
from ..core import CORE, CORE_REASON
from ..errors import SegmentError
from ..memory.leftovers import SharedObject, list_all
from ..memory.mapped_file import guards_are_on
from ..memory.segment import shared_memory_room
from ..version import VERSION

if TYPE_CHECKING:
    from .gpus import GpuFacts

_PACKAGES = ("torch", "numpy", "pyzmq", "posix_ipc", "msgspec", "cuda-core", "cuda-bindings")
_VARIABLES = {
    "CUDA_VISIBLE_DEVICES",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TMPDIR",
}
_VARIABLE_PREFIXES = ("SHMTRANSPORT_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
_MAPPED = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+) (\d+) +/dev/shm/shmtransport-[0-9a-f]{32} \(deleted\)$"
)
UNKNOWN = "unknown"
_NO_EXCHANGE = "; tensors by the Python twin, since this torch has no DLPack exchange table (2.10 and later have)"

SegmentId: TypeAlias = "tuple[str, str]"
"""A segment's device and inode, as ``/proc/PID/maps`` writes them."""


def _without_exchange() -> str:
    """What is to be said of a torch that the compiled core can't make tensors with; nothing of any other."""
    from ..memory.views import HAS_EXCHANGE  # only here: what needs no torch must not wait for it

    return _NO_EXCHANGE if CORE == "native" and not HAS_EXCHANGE else ""


@dataclass(frozen=True)
class ConnectedSegments:
    """The segments of connections, which have no name, in processes that this user may inspect."""

    count: int
    nbytes: int
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Limit:
    """A resource limit; None means unlimited."""

    soft: int | None
    hard: int | None


@dataclass(frozen=True)
class MachineFacts:
    """Facts about this machine.

    Attributes:
        versions: versions of the packages that the transport uses.
        kernel: name, release and architecture.
        cores: how many this process may use.
        shm_bytes: the size of /dev/shm; 0 if there is none.
        shm_free_bytes: how much of it is free.
        connected: the segments of connections.
        named: what has a name in /dev/shm.
        open_files: this process's limit.
        locked_memory_bytes: this process's limit.
        environment: the variables that matter to the transport.
        huge_pages: the kernel's rule for shared memory, and the mount option of /dev/shm.
        core: which twin of the core is in use, and why.
        gpus: the GPUs that this process sees.
        no_gpu: why it sees none; empty if it does.
        guarded: whether a segment that a peer cuts short costs its connection only; otherwise it ends the process.
    """

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
    core: str
    guarded: bool
    gpus: tuple[GpuFacts, ...] = ()
    no_gpu: str = ""


def machine_facts() -> MachineFacts:
    """Collect the facts about this machine and this process."""
    from .gpus import gpu_facts  # only here: it imports torch

    total, free = shm_room()
    gpus, no_gpu = gpu_facts()
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
        core=f"{CORE}: {CORE_REASON}{_without_exchange()}",
        guarded=guards_are_on(),
        gpus=gpus,
        no_gpu=no_gpu,
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that the transport uses."""
    import zmq  # here, since `shmtransport ls` does without

    found = {"shmtransport": VERSION, "Python": platform.python_version()}
    found.update((package, _version_of(package)) for package in _PACKAGES)
    return {**found, "libzmq": zmq.zmq_version()}


def _version_of(package: str) -> str:
    from importlib import metadata  # only here: `ls` needs no versions and must be quick

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def shm_room() -> tuple[int, int]:
    """Return the size of /dev/shm and how much is free, in bytes; 0 and 0 if there is none."""
    try:
        return shared_memory_room()
    except SegmentError:
        return 0, 0


def environment(variables: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Return the variables that can change what the transport does, sorted by name."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES) or value.startswith(IPC)
    }


def connected_segments() -> ConnectedSegments:
    """Find the segments that processes have mapped and that have lost their name."""
    sizes: dict[SegmentId, int] = {}
    processes = []
    for process, mapped in processes_with_segments():
        processes.append(process)
        for segment, (nbytes, _) in mapped.items():
            sizes[segment] = max(sizes.get(segment, 0), nbytes)
    return ConnectedSegments(len(sizes), sum(sizes.values()), tuple(sorted(processes)))


def processes_with_segments() -> Iterator[tuple[int, dict[SegmentId, tuple[int, int]]]]:
    """Yield each process that has mapped segments, with its ``mappings``."""
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        if mapped := mappings(entry):
            yield int(entry), mapped


def mappings(process: str) -> dict[SegmentId, tuple[int, int]]:
    """Return, for each segment that a process has mapped, the bytes in all and how often it is mapped."""
    found: dict[SegmentId, tuple[int, int]] = {}
    try:
        with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if (match := _MAPPED.match(line)) is not None:
                    start, end, offset, device, inode = match.groups()
                    nbytes, times = found.get((device, inode), (0, 0))
                    is_first = int(offset, 16) == 0 or not times  # one mapping may be several lines
                    found[device, inode] = nbytes + int(end, 16) - int(start, 16), times + is_first
    except OSError:  # the process has ended, or is another user's
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
    """Return the ``huge=`` option of /dev/shm; "never" if it was mounted without."""
    try:
        with open("/proc/mounts", encoding="utf-8") as mounts:
            options = [line.split()[3] for line in mounts if line.split()[1] == "/dev/shm"]
    except OSError:
        return UNKNOWN
    found = re.search(r"(?:^|,)huge=(\w+)", options[-1]) if options else None
    return "never" if found is None else found[1]
