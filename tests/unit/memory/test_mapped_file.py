"""A segment that is cut short: zeros and an error in place of the end of the process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from shmtransport.core.layout import PAGE_BYTES, Layout
from shmtransport.errors import PeerProtocolError
from shmtransport.memory.mapped_file import guards_are_on, map_file
from shmtransport.memory.receive_arena import ReceiveArena, release_cells
from shmtransport.memory.segment import Segment
from tests.support.process import ROOT

pytestmark = pytest.mark.skipif(not guards_are_on(), reason="there is no compiled core")

LAYOUT = Layout(data_bytes=16 * PAGE_BYTES)

OUTSIDE = """
import mmap, os, signal, sys, tempfile
from shmtransport.core.layout import Layout
from shmtransport.memory.segment import Segment

what = sys.argv[1]
if what == "handled before":
    signal.signal(signal.SIGBUS, lambda *_: os._exit(7))
segment = Segment.create(Layout(data_bytes=4096))
segment.unlink()
if what == "dropped":
    view = segment.data
    segment.close()
    del view
if what in ("sent", "handled before"):
    os.kill(os.getpid(), signal.SIGBUS)
    signal.pause()
segment.close()
with tempfile.TemporaryFile() as file:
    file.truncate(8192)
    mapped = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    mapped[5000]
"""


@pytest.fixture
def ends() -> Iterator[tuple[Segment, Segment]]:
    """A segment, and the same as its peer has it mapped."""
    owner = Segment.create(LAYOUT)
    peer = Segment.attach(owner.name, LAYOUT)
    yield owner, peer
    peer.close()
    owner.close()


def test_what_is_cut_off_reads_as_zeros_and_what_is_not_stays(ends: tuple[Segment, Segment]) -> None:
    """On both sides; each side knows it once it has touched what is gone."""
    owner, peer = ends
    owner.data[:] = b"\7" * len(owner.data)
    os.ftruncate(owner.fd, LAYOUT.data_offset + 4 * PAGE_BYTES)
    assert not peer.was_cut
    assert bytes(peer.data[8 * PAGE_BYTES :]) == bytes(8 * PAGE_BYTES)
    assert peer.was_cut
    assert bytes(peer.data[: 4 * PAGE_BYTES]) == b"\7" * (4 * PAGE_BYTES)
    assert bytes(peer.data[4 * PAGE_BYTES :]) == bytes(12 * PAGE_BYTES)
    assert not owner.was_cut
    owner.data[-1] = 3
    assert owner.was_cut
    assert owner.data[-1] == 3


def test_only_the_segment_that_was_cut_says_so(ends: tuple[Segment, Segment]) -> None:
    """Another one stays as it is."""
    other = Segment.create(LAYOUT)
    os.ftruncate(ends[0].fd, 0)
    assert ends[1].data[0] == 0
    assert ends[1].was_cut
    assert not other.was_cut
    other.close()


def test_a_view_outlives_its_segment_and_is_still_guarded(ends: tuple[Segment, Segment]) -> None:
    """The guard ends with the mapping, not with the Segment."""
    owner, peer = ends
    view = torch.frombuffer(peer.data, dtype=torch.uint8)
    peer.close()
    os.ftruncate(owner.fd, 0)
    assert int(view.sum()) == 0


@pytest.mark.filterwarnings("error")
def test_a_mapping_that_can_not_be_made_is_an_error_and_nothing_else() -> None:
    """Such as one without a descriptor left: its end, too, is silent."""
    with pytest.raises(OSError, match="descriptor"):
        map_file(1 << 20, PAGE_BYTES)
    gc.collect()


def test_nothing_is_taken_from_an_arena_that_was_cut(ends: tuple[Segment, Segment]) -> None:
    """The error is the peer's."""
    owner, peer = ends
    arena = ReceiveArena(peer, release_cells(owner))
    arena.check_whole()
    os.ftruncate(owner.fd, LAYOUT.data_offset)
    assert peer.data[0] == 0
    with pytest.raises(PeerProtocolError, match="cut its segment short"):
        arena.check_whole()


@pytest.mark.parametrize(
    ("what", "code"),
    [("touched", -signal.SIGBUS), ("sent", -signal.SIGBUS), ("dropped", -signal.SIGBUS), ("handled before", 7)],
)
def test_every_other_bus_error_is_what_it_was(what: str, code: int) -> None:
    """One of another mapping ends the process, so does a signal that was sent; a handler that was there is called."""
    ended = subprocess.run([sys.executable, "-c", OUTSIDE, what], cwd=ROOT, check=False, capture_output=True)
    assert ended.returncode == code, ended.stderr.decode()


def test_a_switch_leaves_the_processs_handler_alone() -> None:
    """Then a segment that was cut ends the process, as without the compiled core."""
    program = (
        "import os\n"
        "from shmtransport.core.layout import Layout\n"
        "from shmtransport.memory.segment import Segment\n"
        "segment = Segment.create(Layout(data_bytes=4096))\n"
        "segment.unlink()\n"
        "os.ftruncate(segment.fd, 0)\n"
        "segment.data[0]\n"
    )
    for switch, code in (("off", -signal.SIGBUS), ("", 0)):
        environment = {**os.environ, "SHMTRANSPORT_SIGBUS": switch}
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, env=environment)
        assert ended.returncode == code
