"""What killed processes leave in /dev/shm; what a living one holds is never removed."""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

from shmtransport import Client, Server
from shmtransport.core.layout import Layout
from shmtransport.diagnostics.facts import connected_segments, mappings
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.errors import SegmentError
from shmtransport.memory import leftovers, named_object
from shmtransport.memory.leftovers import SharedObject, in_words, list_all, remove_dead, sweep
from shmtransport.memory.owner_lock import holder, keep_claims_out
from shmtransport.memory.segment import NAME_PREFIX, SEGMENTS, Segment
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    Attach,
    ChannelKind,
    Hello,
    Offer,
    Welcome,
    decode,
    encode,
)
from tests.support.helpers import MIB, Serve, echo, eventually
from tests.support.left_behind import FIRST_BYTE_ONLY, IN_PIECES, MAKER, OWNER, REMOVER, kill, named
from tests.support.process import ROOT, Process
from tests.support.strangers import Stranger

pytestmark = pytest.mark.timeout(60)

Spawn = Callable[..., Process]
LAYOUT = Layout(data_bytes=MIB, release_slots=16)
SERVER = ROOT / "tests/support/processes/server.py"


@pytest.fixture
def run_script(directory: Path, spawn: Spawn) -> Callable[..., Process]:
    """Start a script that is given as text."""

    def start(text: str, *arguments: str, ready: bool = True) -> Process:
        script = directory / f"script{len(text)}.py"
        script.write_text(text)
        return spawn(script, *arguments, ready=ready)

    return start


@pytest.fixture
def owner(run_script: Callable[..., Process]) -> tuple[Process, str]:
    """A process that owns a segment, with its name."""
    process = run_script(OWNER)
    return process, process.readline().strip()


@pytest.fixture
def clean_up() -> Iterator[list[str]]:
    """Paths to remove in the end."""
    paths: list[str] = []
    yield paths
    for path in paths:
        if os.path.lexists(path):
            os.unlink(path)


def test_what_a_killed_process_left_is_removed_and_not_before(owner: tuple[Process, str]) -> None:
    """Running or stopped, the process is the owner; once it is killed its segment is dead, and is removed."""
    process, name = owner
    for number in (signal.SIGCONT, signal.SIGSTOP):
        process.signal(number)
        found = named()[name]
        assert found.owner_pid == process.pid
        assert name not in {one.name for one in remove_dead()}
    assert found.nbytes == LAYOUT.total_bytes
    assert 0 <= found.age_s < 60
    assert not found.dead

    kill(process)
    assert named()[name].owner_pid is None
    assert named()[name].dead
    assert name in {one.name for one in remove_dead()}
    assert name not in named()
    assert not os.path.exists(SEGMENTS.file(name))


def test_this_processs_own_are_never_removed_nor_given_up_by_looking(run_script: Callable[..., Process]) -> None:
    """Closing any descriptor of an own segment would end its lock: after looking, another process still respects it."""
    segment = Segment.create(LAYOUT)
    try:
        assert named()[segment.name].owner_pid == os.getpid()
        assert segment.name not in {one.name for one in remove_dead()}
        assert not SEGMENTS.remove_if_dead(segment.name)
        other = run_script(REMOVER)
        assert segment.name not in other.readline().split()
        assert os.path.exists(SEGMENTS.file(segment.name))
    finally:
        segment.close()
    assert segment.name not in named()


def test_a_segment_that_is_just_being_made_is_not_lost(run_script: Callable[..., Process]) -> None:
    """While others sweep without pause, every segment that is made has its name when it is handed out."""
    maker = run_script(MAKER.replace("+ 3.0", "+ 1.0"))
    while not select.select([maker.output], [], [], 0)[0]:
        remove_dead()
    made, lost = map(int, maker.readline().split())
    assert made > 100
    assert lost == 0
    assert not [one for one in list_all() if one.owner_pid == maker.pid]


@pytest.mark.parametrize("removed", [True, False], ids=["after", "during"])
def test_a_maker_whose_segment_is_swept_makes_another(monkeypatch: pytest.MonkeyPatch, *, removed: bool) -> None:
    """Between its making and its locking a sweeper may have removed the name, or be about to."""
    seen: list[str] = []
    sweepers: list[int] = []
    claim = SEGMENTS.claim

    def claim_late(fd: int) -> bool:
        path = os.readlink(f"/proc/self/fd/{fd}")
        seen.append(path)
        if len(seen) == 1:
            sweepers.append(os.open(path, os.O_RDWR))
            assert keep_claims_out(sweepers[0])
            if removed:
                os.unlink(path)
                os.close(sweepers.pop())
        return claim(fd)

    monkeypatch.setattr(SEGMENTS, "claim", claim_late)
    segment = Segment.create(LAYOUT)
    try:
        assert len(seen) == 2
        assert SEGMENTS.file(segment.name) == seen[1]
        assert os.path.exists(seen[1])
        assert not os.path.exists(seen[0])
    finally:
        segment.close()
        for fd in sweepers:
            os.close(fd)


def test_a_maker_whose_segments_are_all_swept_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some attempts it says what must be going on; nothing of them is left."""
    attempts: list[int] = []
    monkeypatch.setattr(SEGMENTS, "claim", lambda fd: bool(attempts.append(fd)))
    before, open_before = set(named()), len(os.listdir("/proc/self/fd"))
    with pytest.raises(SegmentError, match="does something sweep /dev/shm"):
        Segment.create(LAYOUT)
    assert 2 <= len(attempts) < 100
    assert not {name for name in set(named()) - before if SEGMENTS.owner_of(name) == os.getpid()}
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_sweeper_is_never_taken_for_an_owner(owner: tuple[Process, str]) -> None:
    """While one process removes a dead segment, another that looks at it still finds it dead, and leaves it alone."""
    process, name = owner
    kill(process)
    fd = os.open(SEGMENTS.file(name), os.O_RDWR)
    try:
        assert keep_claims_out(fd)
        assert holder(fd) is None
        assert SEGMENTS.owner_of(name) is None
        assert not SEGMENTS.remove_if_dead(name)
    finally:
        os.close(fd)
    assert SEGMENTS.remove_if_dead(name)


def test_an_owner_that_keeps_no_sweeper_out_is_an_owner(
    run_script: Callable[..., Process], clean_up: list[str]
) -> None:
    """The first byte's lock alone identifies a segment's owner, regardless of who made it."""
    name = NAME_PREFIX + "a" * 32
    clean_up.append(SEGMENTS.file(name))
    process = run_script(FIRST_BYTE_ONLY, SEGMENTS.file(name))
    assert named()[name].owner_pid == process.pid
    assert not SEGMENTS.remove_if_dead(name)
    kill(process)
    assert SEGMENTS.remove_if_dead(name)


def test_names_that_are_not_ours_are_neither_listed_nor_removed(clean_up: list[str], tmp_path: Path) -> None:
    """Other programs' files, near misses, and a link to a file."""
    digits = "e" * 32
    target = tmp_path / "target"
    target.write_text("precious")
    files = [
        f"/dev/shm/unrelated-{digits}",
        f"/dev/shm{NAME_PREFIX}{digits}.old",
        f"/dev/shm{NAME_PREFIX}{digits[1:]}",
        "/dev/shm/sem.unrelated",
        f"/dev/shm/sem.{NAME_PREFIX[1:]}{digits}",
    ]
    link = f"/dev/shm{NAME_PREFIX}{'d' * 32}"
    clean_up += [*files, link]
    for path in files:
        Path(path).write_bytes(b"")
    os.symlink(target, link)
    before = {one.name for one in list_all()}
    assert not {SEGMENTS.file(name) for name in before} & set(clean_up)
    remove_dead()
    for path in clean_up:
        assert os.path.lexists(path)
    assert not SEGMENTS.remove_if_dead(link.removeprefix("/dev/shm")), "a link is not followed"
    assert target.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_another_users_are_left_alone_even_by_root(clean_up: list[str]) -> None:
    """A dead segment of another user stays."""
    path = f"/dev/shm{NAME_PREFIX}{'b' * 32}"
    clean_up.append(path)
    Path(path).write_bytes(b"x")
    os.chown(path, 65534, 65534)
    assert "/" + Path(path).name not in {one.name for one in list_all()}
    remove_dead()
    assert os.path.exists(path)


# Real processes, killed at the worst moment


def test_a_client_killed_before_the_server_maps_its_segment(
    fake_server: zmq.Socket[bytes], address: str, run_script: Callable[..., Process]
) -> None:
    """Its segment stays behind, and is found."""
    client = run_script(
        "import sys\nfrom shmtransport import Client\nprint('ready', flush=True)\n"
        "Client(sys.argv[1], channel='doorbell', arena_bytes=1 << 20, connect_timeout_s=30.0)\n",
        address,
    )
    assert fake_server.poll(20_000)
    identity, data = fake_server.recv_multipart()
    assert isinstance(decode(data), Hello)
    fake_server.send_multipart([identity, encode(Offer(DEFAULT_MAX_MESSAGE_BYTES))])
    assert fake_server.poll(20_000)
    attach = decode(fake_server.recv_multipart()[1])
    assert isinstance(attach, Attach)
    assert named()[attach.segment].owner_pid == client.pid
    kill(client)
    assert attach.segment in {one.name for one in remove_dead()}


def test_a_server_killed_before_the_client_maps_its_segment(
    spawn: Spawn, address: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next server to start, at any address, removes the segment, and logs it without its name."""
    process = spawn(SERVER, address)
    one = Stranger(address)
    one.send(Hello(MIB, MIB, DEFAULT_MAX_MESSAGE_BYTES, "doorbell"))
    offer = one.receive()
    assert isinstance(offer, Offer)
    segment = Segment.create(segment_layout(MIB, offer.max_message_bytes))
    one.send(Attach(segment.name))
    welcome = one.receive()
    segment.close()
    one.close()
    assert isinstance(welcome, Welcome)
    left = welcome.segment
    assert named()[left].owner_pid == process.pid
    with Server(f"ipc://{directory}/second.ipc"):
        assert left in named(), "a living server's are left alone by others that start"
    kill(process)
    assert named()[left].dead
    caplog.set_level(logging.INFO, "shmtransport")
    with Server(f"ipc://{directory}/third.ipc"):
        assert left not in named()
    lines = [record.getMessage() for record in caplog.records if "removed from /dev/shm" in record.getMessage()]
    assert len(lines) == 1
    assert "segment" in lines[0]
    assert NAME_PREFIX not in lines[0]


# The sweep of a server that starts


def test_a_server_starts_even_if_sweeping_fails(
    serve: Serve, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with what others have left, it is no error of this server."""

    def fail() -> list[SharedObject]:
        raise RuntimeError("/dev/shm is odd")

    caplog.set_level(logging.INFO, "shmtransport")
    monkeypatch.setattr(leftovers, "remove_dead", fail)
    serve(echo=echo)
    with Client(address) as client:
        assert client.call("echo", 1) == 1
    assert "could not be removed" in caplog.text


def test_a_machine_without_shared_memory_has_no_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /dev/shm, nothing in it; and where nothing was left nothing is logged."""
    monkeypatch.setattr(named_object, "DIRECTORY", "/no/such/directory")
    assert list_all() == []
    sweep()


def test_what_was_found_is_said_in_words() -> None:
    """Their number and memory; singular and plural."""
    segment = SharedObject("/a", MIB, None, 1.0)
    assert in_words([]) == "nothing"
    assert in_words([segment]) == "1 segment (1.0 MiB) of dead processes"
    assert in_words([segment, segment]) == "2 segments (2.0 MiB) of dead processes"


# What connections hold, by no name


def test_a_segment_counts_in_full(run_script: Callable[..., Process]) -> None:
    """However many pieces its mapping has; one that has its name still doesn't count, nor does a dead process."""
    process = run_script(IN_PIECES)
    assert [nbytes for nbytes, _ in mappings(str(process.pid)).values()] == [LAYOUT.total_bytes]
    kill(process)
    assert mappings(str(process.pid)) == {}
    before = mappings(str(os.getpid()))
    segment = Segment.create(LAYOUT)
    assert mappings(str(os.getpid())) == before
    segment.close()


def test_a_closed_connections_memory_is_given_back_without_a_collection(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """While it is open both processes have both segments mapped; an idle server keeps nothing of a client that left."""
    server = spawn(SERVER, address)

    def of_server() -> int:
        return len(mappings(str(server.pid)))

    gc.disable()
    try:
        with Client(address, channel=channel, arena_bytes=4 * MIB) as client:
            client.call("echo", torch.ones(1000))
            found = connected_segments()
            assert {server.pid, os.getpid()} <= set(found.processes)
            assert of_server() == 2
            assert found.nbytes >= 8 * MIB
        assert eventually(lambda: of_server() == 0)
    finally:
        gc.enable()
