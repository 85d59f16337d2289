"""The ends of processes, in order and not: what the other side gets, and that nothing stays behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shmtransport import CallTimeout, Client, ConnectRefused, ConnectTimeout, PeerDied, Server
from tests.conftest import ROOT, Process

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
SERVER = ROOT / "tests/scripts/server.py"
TALLY = ROOT / "tests/scripts/tally.py"
CLIENT = ROOT / "tests/scripts/client.py"
Spawn = Callable[..., Process]


def start_both(spawn: Spawn, server: Path, address: str, what: str) -> tuple[Process, Process]:
    """A server (no more than 2 MiB of arenas if it is the tally) and a client of 2 MiB, started at once."""
    started = spawn(server, address, str(2 * MIB), ready=False), spawn(CLIENT, address, what, str(MIB), ready=False)
    for process in started:
        process.wait_until_ready()
    return started


def segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("shmtransport-")}


def connect_within(address: str, arena_bytes: int, within_s: float = 5.0) -> Client:
    """A client with both arenas of this size, as soon as the server grants them."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return Client(address, arena_bytes=arena_bytes)
        except ConnectRefused:  # noqa: PERF203
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_connection_has_no_name_in_dev_shm(spawn: Spawn, address: str) -> None:
    """Both segments are unlinked once both sides have them mapped, while they are in use: nothing can stay behind."""
    before = segments()
    spawn(SERVER, address)
    with Client(address) as client:
        x = client.empty((1000,), torch.float32).fill_(2)
        y = client.call("double", x)
        assert segments() <= before
        assert y.sum() == 4000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_the_server_in_order(spawn: Spawn, address: str, directory: Path, number: int) -> None:
    """It exits with 0, says "stopped", removes its socket; the client's next call and all later ones are PeerDied."""
    server = spawn(SERVER, address)
    client = Client(address)
    held = client.call("fill", 100, 7.0)
    server.signal(number)
    assert server.readline() == "stopped"
    assert server.wait() == 0
    assert not (directory / "server.ipc").exists()
    for _ in range(2):
        with pytest.raises(PeerDied):
            client.call("echo", 1)
    with pytest.raises(PeerDied):
        client.empty((1,), torch.uint8)
    assert torch.equal(held, torch.full((100,), 7.0))
    client.close()


def test_a_server_without_clients_stops_in_order_too(spawn: Spawn, address: str) -> None:
    """Also when nothing ever arrived: the wait itself is ended."""
    server = spawn(SERVER, address)
    Client(address).close()  # it serves by now, so that its handlers of signals are in place
    server.signal(signal.SIGINT)
    assert server.readline() == "stopped"
    assert server.wait() == 0


def test_a_stopping_server_finishes_the_call_in_progress(spawn: Spawn, address: str) -> None:
    """Its reply arrives, and those of the calls that were queued behind it; then it is gone."""
    server = spawn(SERVER, address)
    client = Client(address)
    first = client.submit("sleep", 0.5)
    time.sleep(0.1)
    second = client.submit("echo", 2)
    server.signal(signal.SIGTERM)
    assert first.result(timeout_s=10) is None
    assert second.result(timeout_s=10) == 2
    with pytest.raises(PeerDied):
        client.call("echo", 3)
    assert server.wait() == 0
    client.close()


def test_a_server_killed_in_mid_call_is_noticed(spawn: Spawn, address: str) -> None:
    """Every call in flight fails with PeerDied, not with a time-out, and so does every later use."""
    server = spawn(SERVER, address)
    client = Client(address, timeout_s=50.0)
    held = client.call("fill", 100, 7.0)
    pending = [client.submit("sleep", 60), client.submit("echo", 1)]
    time.sleep(0.1)
    server.signal(signal.SIGKILL)
    for reply in pending:
        with pytest.raises(PeerDied, match="has ended"):
            reply.result()
    for use in (lambda: client.call("echo", 1), lambda: client.submit("echo"), lambda: client.empty((1,), torch.int8)):
        with pytest.raises(PeerDied):
            use()
    assert torch.equal(held, torch.full((100,), 7.0)), "results stay valid"
    client.close()
    del held


def test_a_server_killed_between_calls_is_noticed_by_the_next(spawn: Spawn, address: str) -> None:
    """The call after the server's death is PeerDied, and a new server at the address gets new clients."""
    server = spawn(SERVER, address)
    client = Client(address, timeout_s=50.0)
    client.call("echo", 1)
    server.signal(signal.SIGKILL)
    server.wait()
    with pytest.raises(PeerDied):
        client.call("echo", 2)
    client.close()
    spawn(SERVER, address)  # over the dead one's socket file
    with Client(address) as again:
        assert again.call("echo", 3) == 3


def test_a_reply_sent_before_the_servers_death_still_counts(spawn: Spawn, address: str) -> None:
    """What had been answered is a result, not PeerDied."""
    server = spawn(SERVER, address)
    client = Client(address)
    answered = client.submit("fill", 100, 5.0)
    time.sleep(0.5)
    server.signal(signal.SIGKILL)
    server.wait()
    assert torch.equal(answered.result(), torch.full((100,), 5.0))
    with pytest.raises(PeerDied):
        client.call("echo", 1)
    client.close()


def test_a_stopped_server_is_alive(spawn: Spawn, address: str) -> None:
    """SIGSTOP isn't death: CallTimeout says that it is alive, and after SIGCONT the connection works."""
    server = spawn(SERVER, address)
    with Client(address) as client:
        assert client.call("echo", 1) == 1
        server.signal(signal.SIGSTOP)
        try:
            pending = client.submit("echo", 2)
            with pytest.raises(CallTimeout, match="alive"):
                pending.result(timeout_s=1.0)
            with pytest.raises(ConnectTimeout):
                Client(address, connect_timeout_s=0.2)
        finally:
            server.signal(signal.SIGCONT)
        assert client.call("echo", 3) == 3
        x = torch.arange(1000.0)
        assert torch.equal(client.call("double", x), x * 2)
    with Client(address) as late:
        assert late.call("echo", 4) == 4


@pytest.mark.parametrize("what", ["hold", "call", "queue"])
def test_a_killed_clients_share_is_free_again(spawn: Spawn, address: str, what: str) -> None:
    """Killed with borrows, in mid-call or with calls queued: on_disconnect tells once, and a new client gets all."""
    tally, client = start_both(spawn, TALLY, address, what)
    client.signal(signal.SIGKILL)
    assert client.wait() == -signal.SIGKILL
    assert tally.readline() == "left 1"
    with connect_within(address, MIB) as whole:
        assert torch.equal(whole.call("fill", MIB // 4, 2.0), torch.full((MIB // 4,), 2.0))
    assert tally.readline().startswith("left ")
    tally.signal(signal.SIGTERM)
    assert tally.readline() == "stopped"


def test_a_client_that_exits_without_closing_is_noticed_and_does_not_hang(spawn: Spawn, address: str) -> None:
    """Forgetting close() costs nothing: the process ends, and the server frees its share."""
    tally, client = start_both(spawn, TALLY, address, "leave")
    assert client.wait() == 0
    assert client.readline() == "", "nothing was said at exit"
    assert tally.readline() == "left 1"
    connect_within(address, MIB).close()


def test_a_forked_childs_end_does_not_touch_its_parents_connection(spawn: Spawn, address: str) -> None:
    """The child neither unlinks, nor says goodbye, nor makes the server think that its parent has died."""
    _, client = start_both(spawn, SERVER, address, "fork")
    assert client.readline() == "64.0 48.0"
    assert client.wait() == 0


def test_ctrl_c_ends_a_waiting_client_and_leaves_nothing(spawn: Spawn, address: str) -> None:
    """A client that waits for a reply can be interrupted at once; the server serves on."""
    _, client = start_both(spawn, TALLY, address, "call")
    time.sleep(0.3)
    client.signal(signal.SIGINT)
    assert client.wait(10) != 0
    with connect_within(address, MIB) as whole:
        assert whole.call("echo", 1) == 1


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pyzmq's: the socket was not closed
def test_a_client_that_was_never_closed_does_not_hang_in_a_collection(
    spawn: Callable[..., Process], address: str
) -> None:
    """A forgotten client with an unsent call to a dead server is collected at once."""
    server = spawn(SERVER, address)
    client = Client(address)
    server.signal(signal.SIGKILL)
    server.wait()
    client.submit("echo", 1)
    reference = weakref.ref(client)
    del client
    gc.collect()
    assert reference() is None


def test_a_signal_wakes_a_server_that_is_about_to_block(address: str) -> None:
    """While it serves, Python's own signal handler writes where the poll looks, so that no signal comes too early."""
    seen: list[int] = []
    with Server(address) as server:

        @server.method
        def look() -> None:
            seen.append(signal.set_wakeup_fd(-1))
            signal.set_wakeup_fd(seen[0])
            server.stop()

        def ask() -> None:
            with Client(address) as client:
                client.call("look")

        asking = threading.Thread(target=ask)
        asking.start()
        server.serve()
        asking.join()
    assert seen[0] >= 0
    assert signal.set_wakeup_fd(-1) == -1, "what was set before is set again"
