"""A server that is killed (-9), at any moment: every call in flight ends with PeerDied, never with a time-out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator

import pytest
import torch

import shmtransport.link
from shmtransport import ArenaFull, Client, ConnectTimeout, PeerDied, TransportError
from shmtransport.connection import Connection
from shmtransport.handshake import Wishes, client_handshake
from shmtransport.message import ChannelKind
from shmtransport.statistics import Counters
from tests.conftest import Process

from .helpers import KIB, Spawn, eventually, in_thread, start_server

pytestmark = pytest.mark.timeout(60)

SOON_S = 5.0  # a time-out of the test, not what is promised


def kill(server: Process) -> None:
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL


def expect_the_end(client: Client) -> None:
    """Every use of the client says PeerDied, at once."""
    for use in (lambda: client.call("echo", 1), lambda: client.submit("echo"), lambda: client.empty((1,), torch.int8)):
        with pytest.raises(PeerDied):
            use()
    client.close()


def test_while_it_is_idle(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """The call after the server's death is PeerDied, and a new server at the address gets new clients."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel, timeout_s=50.0)
    client.call("echo", 1)
    kill(server)
    with pytest.raises(PeerDied):
        client.submit("echo", 2).result()
    expect_the_end(client)
    start_server(spawn, address)  # over the dead one's socket file
    with Client(address, channel=channel) as again:
        assert again.call("echo", 3) == 3


def test_in_a_handler_and_with_calls_queued(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """All calls in flight fail, that being handled and those behind it, and so does every later use."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel, timeout_s=50.0)
    held = client.call("fill", 100, 7.0)
    pending = [client.submit("sleep", 60), *(client.submit("total", torch.ones(100)) for _ in range(50))]
    time.sleep(0.1)
    server.signal(signal.SIGKILL)
    killed = time.monotonic()
    for reply in pending:
        with pytest.raises(PeerDied, match="has ended"):
            reply.result()
    assert time.monotonic() - killed < SOON_S
    expect_the_end(client)
    assert torch.equal(held, torch.full((100,), 7.0)), "results stay valid"


def test_while_several_threads_wait(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """Each of them gets PeerDied: the one that receives, and those that wait for their turn."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel, timeout_s=50.0)
    client.call("echo")
    waiting = [in_thread(client.call, "sleep", 60) for _ in range(6)]
    assert eventually(lambda: client.statistics().in_flight_peak == 6)
    kill(server)
    for call in waiting:
        with pytest.raises(PeerDied):
            call.result(SOON_S)
    expect_the_end(client)


def test_while_the_client_waits_for_room_in_its_arena(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """A claim that waits for releases that can't come any more ends with PeerDied, whoever is first to notice."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=50.0)
    client.call("keep", torch.ones(48 * KIB, dtype=torch.uint8))
    claims = [
        *(in_thread(client.call, "echo", torch.ones(32 * KIB, dtype=torch.uint8)) for _ in range(3)),
        *(in_thread(client.empty, (32 * KIB,), torch.uint8) for _ in range(3)),
    ]
    assert eventually(lambda: client.statistics().stalls == 6)
    kill(server)
    for claim in claims:
        with pytest.raises(PeerDied):
            claim.result(SOON_S)
    expect_the_end(client)


def test_while_the_client_waits_for_room_in_a_full_queue(spawn: Spawn, address: str) -> None:
    """A request that the message ring has no room for: submit itself ends with PeerDied."""
    server = start_server(spawn, address)
    client = Client(address, channel="doorbell", timeout_s=50.0)
    client.submit("sleep", 60)

    def flood() -> None:
        while True:
            client.submit("echo", "x" * 60_000)

    flooding = in_thread(flood)
    assert eventually(lambda: client.statistics().stalls > 0)
    kill(server)
    with pytest.raises(PeerDied):
        flooding.result(SOON_S)
    expect_the_end(client)


def test_a_reply_that_was_sent_before_still_counts(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """What had been answered is a result, not PeerDied."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel)
    answered = client.submit("fill", 100, 5.0)
    time.sleep(0.3)
    kill(server)
    assert torch.equal(answered.result(), torch.full((100,), 5.0))
    with pytest.raises(PeerDied):
        client.call("echo", 1)
    client.close()


@pytest.mark.parametrize("answers", [1, 2], ids=["before its Welcome", "after its Welcome"])
def test_in_mid_handshake(
    spawn: Spawn, address: str, channel: ChannelKind, answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting fails with an error of this package in its own time; the fixtures see that no segment stays."""
    server = start_server(spawn, address)

    def interrupted(wishes: Wishes, counters: Counters) -> Generator[bytes, bytes, Connection]:
        """The client's half; the server is killed once it has given so many answers, before the client acts on it."""
        ours = client_handshake(wishes, counters)
        data = next(ours)
        for number in range(1, 3):
            answer = yield data
            if number == answers:
                server.signal(signal.SIGSTOP)  # so that it can't have read what comes now
                server.signal(signal.SIGKILL)
                server.wait()
            try:
                data = ours.send(answer)
            except StopIteration as end:
                connection: Connection = end.value
                return connection
        raise AssertionError("the handshake goes on for longer than it should")

    monkeypatch.setattr(shmtransport.link, "client_handshake", interrupted)
    started = time.monotonic()
    with pytest.raises(TransportError) as caught:
        Client(address, channel=channel, connect_timeout_s=0.5)
    assert isinstance(caught.value, ConnectTimeout) is (answers == 1)
    assert time.monotonic() - started < SOON_S


def test_a_killed_servers_bell_is_removed_by_the_next(spawn: Spawn, address: str) -> None:
    """A bell that lets clients in has a name until its owner closes it; what a dead one left is swept away."""

    def bells(server: Process) -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name.startswith(f"sem.shmtransport-bell-{server.pid}-")]

    server = start_server(spawn, address)
    client = Client(address, channel="doorbell")
    client.call("echo")
    assert len(bells(server)) == 1
    kill(server)
    following = start_server(spawn, address)
    assert bells(server) == []
    assert bells(following) == [], "nobody has asked for one yet"
    client.close()


def test_no_wait_is_longer_than_it_need_be_when_the_server_holds_nothing(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """A full arena and a dead server: loans alone can't be released by it, so that it is ArenaFull at once."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=50.0)
    loan = client.empty((64 * KIB,), torch.uint8)
    kill(server)
    started = time.monotonic()
    with pytest.raises((ArenaFull, PeerDied)):
        client.empty((1,), torch.uint8)
    assert time.monotonic() - started < SOON_S
    assert loan.numel() == 64 * KIB
    client.close()
