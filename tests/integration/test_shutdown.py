"""Orderly exits: what the other side gets, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from types import FrameType

import pytest
import torch

from shmtransport import Client, PeerDied, Server
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import MIB, Spawn, connect_within, mapped_segments, start_client, start_server

pytestmark = pytest.mark.timeout(60)


def test_a_connection_has_no_name_in_dev_shm(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """Both segments are unlinked once both sides have them mapped, while they are in use: nothing can stay behind."""
    before = mapped_segments(os.getpid())
    server = start_server(spawn, address)
    with Client(address, channel=channel) as client:
        x = client.empty((1000,), torch.float32).fill_(2)
        y = client.call("double", x)
        mapped = mapped_segments(server.pid)
        assert len(mapped) == 2
        assert all(path.endswith(" (deleted)") for path in mapped)
        assert mapped_segments(os.getpid()) - before == mapped
        assert y.sum() == 4000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_the_server_in_order(
    spawn: Spawn, address: str, directory: Path, number: int, channel: ChannelKind
) -> None:
    """It exits with 0, says "stopped", removes its socket; the client's next call and all later ones are PeerDied."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel)
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


def test_a_stop_in_the_middle_of_a_stop_does_not_wait_for_it(address: str) -> None:
    """A killed process's children get a signal for each of its threads: one handler interrupts the other's."""
    stops = 0
    with Server(address) as server:

        def interrupt(_frame: FrameType, event: str, _argument: object) -> None:
            nonlocal stops
            if event == "call":  # within ``stop``, where CPython may run a signal handler; not traced itself
                stops += 1
                server.stop()

        previous = sys.gettrace()
        sys.settrace(interrupt)
        try:
            server.stop()
        finally:
            sys.settrace(previous)
        server.serve()  # returns at once
    assert stops > 1


def test_a_server_without_clients_stops_in_order_too(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """A signal ends the wait itself, with no call to answer."""
    server = start_server(spawn, address)
    Client(address, channel=channel).close()  # it serves by now, so that its handlers of signals are in place
    server.signal(signal.SIGINT)
    assert server.readline() == "stopped"
    assert server.wait() == 0


def test_a_stopping_server_answers_what_has_come(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """The reply of the call in progress arrives, and those of the calls queued behind it; then it is gone."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel)
    first = client.submit("sleep", 0.3)
    time.sleep(0.1)
    second = client.submit("echo", 2)
    server.signal(signal.SIGTERM)
    assert first.result(timeout_s=10) is None
    assert second.result(timeout_s=10) == 2
    assert server.wait() == 0
    with pytest.raises(PeerDied):
        client.call("echo", 3)
    client.close()


@pytest.mark.parametrize("drain_timeout_s", [0.0, 0.3])
def test_a_stopping_server_ends_though_more_is_queued_than_it_can_answer_in_time(
    spawn: Spawn, address: str, channel: ChannelKind, drain_timeout_s: float
) -> None:
    """``drain_timeout_s`` is the limit: what isn't answered by then is PeerDied, and not one call is lost silently."""
    server = start_server(spawn, address, drain_timeout_s=drain_timeout_s)
    client = Client(address, channel=channel)
    client.call("echo")
    queued = [client.submit("sleep", 0.2) for _ in range(100)]
    time.sleep(0.1)
    server.signal(signal.SIGTERM)
    assert server.readline() == "stopped"
    assert server.wait(5.0) == 0
    answered = 0
    for reply in queued:
        with contextlib.suppress(PeerDied):
            reply.result(timeout_s=5.0)
            answered += 1
    assert 1 <= answered <= 10 if drain_timeout_s else answered == 1
    client.close()


def test_a_client_that_exits_without_closing_is_noticed_and_does_not_hang(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """Forgetting close() costs nothing: the process ends, and the server frees its share."""
    server = start_server(spawn, address, tells=True, max_total_arena_bytes=2 * MIB)
    client = start_client(spawn, address, channel, "leave")
    assert client.wait() == 0
    assert client.readline() == "", "nothing was said at exit"
    assert server.readline() == "left 1"
    connect_within(address, channel, MIB).close()


def test_ctrl_c_ends_a_waiting_client_and_leaves_nothing(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """A client that waits for a reply can be interrupted at once; the server serves on."""
    start_server(spawn, address, max_total_arena_bytes=2 * MIB)
    client = start_client(spawn, address, channel, "call")
    time.sleep(0.1)
    client.signal(signal.SIGINT)
    assert client.wait(10) != 0
    with connect_within(address, channel, MIB) as whole:
        assert whole.call("echo", 1) == 1


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pyzmq's: the socket was not closed
def test_a_client_that_was_never_closed_does_not_hang_in_a_collection(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """A forgotten client with an unsent call to a dead server is collected at once."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel)
    server.signal(signal.SIGKILL)
    server.wait()
    client.submit("echo", 1)
    reference = weakref.ref(client)
    del client
    gc.collect()
    assert reference() is None


def test_a_signal_wakes_a_server_that_is_about_to_block(address: str, channel: ChannelKind) -> None:
    """While it serves, Python's own signal handler writes where the poll looks, so that no signal comes too early."""
    seen: list[int] = []
    with Server(address) as server:

        @server.method
        def look() -> None:
            seen.append(signal.set_wakeup_fd(-1))
            signal.set_wakeup_fd(seen[0])
            server.stop()

        def ask() -> None:
            with Client(address, channel=channel) as client:
                client.call("look")

        asking = threading.Thread(target=ask)
        asking.start()
        server.serve()
        asking.join()
    assert seen[0] >= 0
    assert signal.set_wakeup_fd(-1) == -1, "what was set before is set again"
