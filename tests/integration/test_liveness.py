"""Peers that are killed (-9) are noticed at any moment and their share is freed; stopped ones (SIGSTOP) are alive."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Generator

import pytest
import torch

import shmtransport.endpoints.client_connection
from shmtransport import ArenaFull, CallTimeout, Client, ConnectTimeout, PeerDied, TransportError
from shmtransport.core import Counters
from shmtransport.endpoints.connection_memory import ConnectionMemory
from shmtransport.endpoints.handshake import client_handshake
from shmtransport.endpoints.options import ClientOptions
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import (
    KIB,
    MIB,
    Spawn,
    connect_within,
    eventually,
    in_thread,
    mapped_segments,
    start_client,
    start_server,
    undisturbed,
)
from tests.support.process import Process

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
    """A claim that waits for releases from a dead server ends with PeerDied, whichever thread notices first."""
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

    def interrupted(
        options: ClientOptions, claim_timeout_s: float, counters: Counters, _new_copies: None
    ) -> Generator[bytes, bytes, ConnectionMemory]:
        """The client's half; the server is killed after this many answers, before the client acts on the last one."""
        ours = client_handshake(options, claim_timeout_s, counters)
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
                connection: ConnectionMemory = end.value
                return connection
        raise AssertionError("the handshake goes on for longer than it should")

    monkeypatch.setattr(shmtransport.endpoints.client_connection, "client_handshake", interrupted)
    started = time.monotonic()
    with pytest.raises(TransportError) as caught:
        Client(address, channel=channel, connect_timeout_s=0.3)
    assert isinstance(caught.value, ConnectTimeout) is (answers == 1)
    assert time.monotonic() - started < SOON_S


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


SHARE = 2 * MIB + 128 * KIB  # of a client with two arenas of 1 MiB, and of one with two of 64 KiB


@pytest.mark.parametrize(
    ("channel", "what"),
    [
        *itertools.product(("zmq", "doorbell"), ("idle", "hold", "call", "queue", "unread")),
        ("doorbell", "flood"),  # ZeroMQ takes 10000 messages before a sender has to wait
    ],
)
def test_a_killed_clients_share_is_free_again(spawn: Spawn, address: str, channel: ChannelKind, what: str) -> None:
    """Killed while idle, with borrows, in mid-call, with calls queued, while it waits for room in its queue, with
    replies that it did not read: on_disconnect tells once, its memory is given back, and a new client gets all.
    """
    server = start_server(spawn, address, tells=True, max_total_arena_bytes=SHARE)
    client = start_client(spawn, address, channel, what)
    assert len(mapped_segments(server.pid)) == 2
    client.signal(signal.SIGKILL)
    assert client.wait() == -signal.SIGKILL
    assert server.readline() == "left 1"
    with connect_within(address, channel, MIB) as whole:
        assert torch.equal(whole.call("fill", MIB // 4, 2.0), torch.full((MIB // 4,), 2.0))
    assert server.readline() == "left 2", "each is told once"
    assert eventually(lambda: mapped_segments(server.pid) == set())
    server.signal(signal.SIGTERM)
    assert server.readline() == "stopped"


@pytest.mark.parametrize("other", ["zmq", "doorbell"])
@pytest.mark.parametrize("what", ["idle", "hold", "unread"])
def test_other_clients_are_undisturbed(
    spawn: Spawn, address: str, channel: ChannelKind, other: ChannelKind, what: str
) -> None:
    """Another client's calls run all the while with contents checked, on either channel."""
    server = start_server(spawn, address, tells=True)
    with undisturbed(address, other):
        client = start_client(spawn, address, channel, what)
        client.signal(signal.SIGKILL)
        client.wait()
        assert server.readline().startswith("left ")


def test_a_handler_that_waits_for_the_room_of_a_killed_client_goes_on(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """With ``claim_timeout_s`` a result waits for the caller's releases: not for those of the dead."""
    server = start_server(spawn, address, tells=True, claim_timeout_s=50.0)
    with Client(address, channel=channel, timeout_s=50.0) as other:
        client = start_client(spawn, address, channel, "hold then ask for more")
        behind = in_thread(other.call, "echo", 1)
        time.sleep(0.1)
        assert not behind.done(), "the server is waiting for room"
        client.signal(signal.SIGKILL)
        assert behind.result(5.0) == 1
        assert server.readline() == "left 2"


def stop(process: Process) -> None:
    """Stop a process, and wait until it has."""
    process.signal(signal.SIGSTOP)
    while True:
        with open(f"/proc/{process.pid}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "T":
                return
        time.sleep(0.001)


def test_calls_to_a_stopped_server_time_out_and_work_again_afterwards(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """CallTimeout says that it is alive; after SIGCONT the same client works, and so does a new one."""
    server = start_server(spawn, address)
    with Client(address, channel=channel) as client:
        assert client.call("echo", 1) == 1
        stop(server)
        try:
            late, in_time = client.submit("fill", 100, 2.0), client.submit("fill", 100, 3.0)
            with pytest.raises(CallTimeout, match="alive"):
                late.result(timeout_s=0.3)
            with pytest.raises(ConnectTimeout):
                Client(address, channel=channel, connect_timeout_s=0.2)
        finally:
            server.signal(signal.SIGCONT)
        assert torch.equal(in_time.result(), torch.full((100,), 3.0)), "sent before, answered after"
        assert client.call("echo", 3) == 3
        x = torch.arange(1000.0)
        assert torch.equal(client.call("double", x), x * 2)
    with Client(address, channel=channel) as other:
        assert other.call("echo", 4) == 4


def test_a_claim_that_waits_for_a_stopped_server_goes_on_afterwards(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """Room that a stopped server holds is waited for; it is no PeerDied, and comes once the server goes on."""
    server = start_server(spawn, address)
    with Client(address, channel=channel, arena_bytes=64 * KIB) as client:
        client.call("echo")
        stop(server)
        first = client.submit("total", torch.ones(48 * KIB, dtype=torch.uint8))
        threading.Timer(0.3, server.signal, [signal.SIGCONT]).start()
        assert client.call("total", torch.ones(32 * KIB, dtype=torch.uint8)) == 32 * KIB
        assert first.result() == 48 * KIB


def test_a_stopped_client_is_not_dropped(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """Its replies wait for it while other clients go on; after SIGCONT all of them are right, and it calls again."""
    server = start_server(spawn, address, tells=True)
    client = start_client(spawn, address, channel, "wait")
    stop(client)
    with undisturbed(address, channel):
        time.sleep(1.0)
    client.signal(signal.SIGCONT)
    assert client.readline() == "right"
    assert client.wait() == 0
    assert [server.readline(), server.readline()] == ["left 2", "left 1"], "the other client's end came first"
