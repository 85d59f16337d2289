"""A claim without room waits, for a limited time, until the peer releases; it never waits where that can't help."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from shmtransport import ArenaFull, CallTimeout, Client, Server
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import KIB, MIB, Serve, Spawn, eventually, in_thread, start_server

pytestmark = pytest.mark.timeout(60)

SOON_S = 5.0  # a time-out of the test; a wait in vain would take longer
ARENA_BYTES = 64 * KIB


def ones(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


# The client's claims


def test_a_claim_waits_for_what_the_server_releases(shared_server: str, channel: ChannelKind) -> None:
    """An argument that is copied in, and a loan: each gets its room when the server is done with what is there."""
    with Client(shared_server, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=20.0) as client:
        for claim in (lambda: client.empty((48 * KIB,), torch.uint8), lambda: client.submit("echo", ones(48 * KIB))):
            before = client.statistics()
            busy = client.submit("total", ones(48 * KIB), 0.4)
            claimed = claim()
            now = client.statistics()
            assert now.stalls == before.stalls + 1
            assert now.stall_seconds > before.stall_seconds
            assert busy.result() == 48 * KIB
            del claimed


def test_after_its_time_a_claim_is_arena_full_with_the_facts(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """What was asked for, what there is, who holds it and for how long; nothing was sent; then there is room again."""
    start_server(spawn, address)
    facts = (
        r"requested 32\.0 KiB; arena is 64\.0 KiB with 16\.0 KiB in its largest gap; 1 blocks held, "
        r"1 borrows by the peer, oldest for \d+\.\d s; .*raise arena_bytes"
    )
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=0.3) as client:
        client.call("keep", ones(48 * KIB))
        for claim in (lambda: client.empty((32 * KIB,), torch.uint8), lambda: client.call("echo", ones(32 * KIB))):
            started = time.monotonic()
            with pytest.raises(ArenaFull, match=facts):
                claim()
            assert time.monotonic() - started >= 0.3
        assert client.statistics().calls == 1
        assert client.statistics().stalls == 2
        client.call("drop")
        assert client.call("total", ones(64 * KIB)) == 64 * KIB


def test_a_claim_fails_at_once_when_the_server_holds_nothing(shared_server: str, channel: ChannelKind) -> None:
    """Only this process could make room then, and it is the one that waits."""
    with Client(shared_server, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=50.0) as client:
        loans = [client.empty((32 * KIB,), torch.uint8) for _ in range(2)]
        client.call("total", loans[0])  # the server held it, and does no longer
        started = time.monotonic()
        with pytest.raises(ArenaFull, match=r"2 blocks held, none of them by the peer"):
            client.empty((1,), torch.uint8)
        with pytest.raises(ArenaFull):
            client.call("echo", ones(1))
        assert time.monotonic() - started < SOON_S
        loans.clear()
        assert client.call("total", ones(64 * KIB)) == 64 * KIB


def test_more_data_than_the_arena_holds_may_be_under_way(shared_server: str, channel: ChannelKind) -> None:
    """200 calls submitted in a row, of 24 KiB each, through 64 KiB: every one succeeds with its own contents."""
    with Client(shared_server, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=20.0) as client:
        copied = [client.submit("total", torch.full((6 * KIB,), float(i))) for i in range(100)]
        lent = []
        for i in range(100):
            loan = client.empty((6 * KIB,), torch.float32).fill_(float(-i))
            lent.append(client.submit("total", loan))
            del loan
        assert [reply.result() for reply in copied] == [6.0 * KIB * i for i in range(100)]
        assert [reply.result() for reply in lent] == [-6.0 * KIB * i for i in range(100)]
        mine = client.statistics()
        assert mine.stalls > 0
        assert (mine.tensors_copied, mine.copies_avoided) == (100, 100)


def test_a_full_queue_is_a_time_out_that_says_so(spawn: Spawn, address: str) -> None:
    """A request that finds no room in the message ring for ``timeout_s`` was not sent, and holds nothing."""
    start_server(spawn, address)
    with Client(address, channel="doorbell", timeout_s=0.1, max_message_bytes=1024, arena_bytes=ARENA_BYTES) as client:
        busy = client.submit("sleep", 1.1)
        time.sleep(0.1)
        sent = [client.submit("echo", "x" * 900) for _ in range(2)]
        for _ in range(2):  # both would not fit the arena
            with pytest.raises(CallTimeout, match=r"not sent.*full for 0\.1 s"):
                client.submit("echo", ["x" * 900, ones(48 * KIB)])
        assert busy.result(timeout_s=5.0) is None
        assert [reply.result(timeout_s=5.0) for reply in sent] == ["x" * 900] * 2
        assert client.statistics().stalls == 2
        assert client.statistics().stall_seconds >= 0.2
        assert client.call("total", ones(64 * KIB)) == 64 * KIB


# The server's claims


def test_a_handler_may_wait_for_what_the_caller_releases(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """With ``claim_timeout_s``: its ``empty`` and the copying of a result wait until the client drops something."""
    start_server(spawn, address, claim_timeout_s=20.0)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=30.0) as client:
        for more in ("fill", 12 * KIB, 2.0), ("double", torch.ones(12 * KIB)), ("echo", torch.full((12 * KIB,), 2.0)):
            held: list[Any] = [client.call("fill", 12 * KIB, 1.0)]
            waiting = client.submit(*more)
            time.sleep(0.1)
            held.clear()
            assert torch.equal(waiting.result(), torch.full((12 * KIB,), 2.0))
            del waiting
        theirs = client.call("statistics")
        assert 1 <= theirs["stalls"] <= 3
        assert theirs["stall_seconds"] > 0


def test_a_handlers_wait_ends_with_its_time(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """The caller's reply waits for room from then on, and others are served."""
    start_server(spawn, address, claim_timeout_s=0.1)
    with (
        Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        Client(address, channel=channel) as other,
    ):
        held = client.call("fill", 12 * KIB, 1.0)
        waiting = client.submit("fill", 12 * KIB, 2.0)
        assert other.call("echo", 1) == 1
        assert not waiting.done()
        assert held[0] == 1.0
        del held
        assert waiting.result()[0] == 2.0


def test_a_handler_does_not_wait_unless_asked_to(shared_server: str, channel: ChannelKind) -> None:
    """By default one client's held results delay no other client."""
    with Client(shared_server, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=50.0) as client:
        held = client.call("fill", 12 * KIB, 1.0)
        waiting = client.submit("fill", 12 * KIB, 2.0)
        with Client(shared_server, channel=channel, timeout_s=SOON_S) as other:
            assert other.call("echo", 1) == 1
        assert client.call("echo", 2) == 2, "nor another call of its own"
        assert not waiting.done()
        assert held[0] == 1.0
        del held
        assert waiting.result()[0] == 2.0


# What is counted


def test_what_is_counted_of_waiting_and_copying(serve: Serve, address: str, channel: ChannelKind) -> None:
    """waits, in_flight_peak, copies_avoided and the histogram, as their documentation says."""
    server: Server

    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 2, out=server.empty(x.shape, x.dtype))

    server = serve(double=double, sleep=time.sleep)
    with Client(address, channel=channel, arena_bytes=MIB) as client:
        assert client.statistics().in_flight_peak == 0
        for pending in [client.submit("double", torch.ones(10)) for _ in range(7)]:
            pending.result()
        loan = client.empty((10,), torch.float32).fill_(1.0)
        for _ in range(3):
            client.call("double", loan)
        waits = client.statistics().waits
        client.call("sleep", 0.05)
        mine = client.statistics()
        assert mine.in_flight_peak == 7
        assert (mine.tensors_sent, mine.tensors_copied, mine.copies_avoided) == (10, 7, 3)
        assert mine.waits > waits, "it had to wait for that one in the kernel"
        assert (mine.stalls, mine.stall_seconds) == (0, 0.0)
        assert sum(count for _, count in mine.latency_histogram) == mine.calls == 11
        bounds = [bound for bound, _ in mine.latency_histogram]
        assert bounds == sorted(bounds)
        assert mine.latency_seconds(1.0) == bounds[-1] >= 0.05
        assert 0 < mine.latency_seconds(0.5) < mine.latency_seconds(1.0)
        assert eventually(lambda: server.statistics().calls == 11)
        theirs = server.statistics()
        assert theirs.copies_avoided == theirs.tensors_sent == 10
        assert theirs.waits > 0
        assert sum(count for _, count in theirs.latency_histogram) == 11


def test_stalls_for_room_are_counted_whether_they_end_well_or_not(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """How often and for how long: also of a claim that fails in the end."""
    start_server(spawn, address)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=0.3) as client:
        client.call("keep", ones(48 * KIB))
        with pytest.raises(ArenaFull):
            client.empty((32 * KIB,), torch.uint8)
        failed = client.statistics()
        assert failed.stalls == 1
        assert failed.stall_seconds >= 0.3


def test_waiting_for_room_keeps_no_other_thread_from_its_reply(shared_server: str, channel: ChannelKind) -> None:
    """The claim waits without any lock that a call needs."""
    with (
        Client(shared_server, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=20.0) as client,
        Client(shared_server, channel=channel) as blocker,
    ):
        quick = client.submit("echo", 1)
        held = client.submit("total", ones(48 * KIB), 0.5)
        claim = in_thread(client.empty, (32 * KIB,), torch.uint8)
        assert eventually(lambda: client.statistics().stalls == 1)
        assert quick.result(timeout_s=SOON_S) == 1
        small = client.submit("total", ones(KIB))
        assert not claim.done()
        assert held.result() == 48 * KIB
        assert claim.result(SOON_S).numel() == 32 * KIB
        assert small.result() == KIB
        assert blocker.call("echo", 2) == 2
