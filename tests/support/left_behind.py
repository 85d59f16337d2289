"""Scripts of processes that leave something in /dev/shm when they are killed, and looking for it."""

from __future__ import annotations

import signal

from shmtransport.memory.leftovers import SharedObject, list_all
from tests.support.process import Process

OWNER = """
import time
from shmtransport.core.layout import Layout
from shmtransport.memory.segment import Segment

segment = Segment.create(Layout(data_bytes=1 << 20, release_slots=16))
print("ready", flush=True)
print(segment.name, flush=True)
time.sleep(60)
"""
FIRST_BYTE_ONLY = """
import fcntl, os, sys, time

fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, 4096)
fcntl.lockf(fd, fcntl.LOCK_EX, 1)
print("ready", flush=True)
time.sleep(60)
"""
IN_PIECES = """
import mmap, time
from shmtransport.memory.mapped_file import mapping_of
from shmtransport.core.layout import Layout
from shmtransport.memory.segment import Segment

segment = Segment.create(Layout(data_bytes=1 << 20, release_slots=16))
segment.unlink()
mapping_of(segment.view).madvise(mmap.MADV_DONTFORK, 8192, 4096)  # a piece of its own
print("ready", flush=True)
time.sleep(60)
"""
MAKER = """
import os, time
from shmtransport.core.layout import Layout
from shmtransport.memory.segment import Segment, SEGMENTS

print("ready", flush=True)
lost = made = 0
deadline = time.monotonic() + 3.0
while time.monotonic() < deadline:
    segment = Segment.create(Layout(data_bytes=4096, release_slots=8))
    lost += not os.path.exists(SEGMENTS.file(segment.name))
    made += 1
    segment.close()
print(made, lost, flush=True)
"""
REMOVER = """
from shmtransport.memory.leftovers import remove_dead
removed = remove_dead()
print("ready", flush=True)
print(*(one.name for one in removed), flush=True)
"""


def named() -> dict[str, SharedObject]:
    return {one.name: one for one in list_all()}


def kill(process: Process) -> None:
    process.signal(signal.SIGKILL)
    process.wait()
