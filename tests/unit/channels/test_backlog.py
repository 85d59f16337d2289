"""Backlogs: a peer's unread messages wait in order, within limits, and are dropped with the peer."""

from __future__ import annotations

import pytest

from shmtransport.channels.backlog import LEAVING_BYTES_LIMIT, LEAVING_LIMIT, QUEUE_LIMIT, QUEUED_BYTES_LIMIT, Backlogs


class Peers:
    """Takes messages while there is room: ``room[peer]`` more; without an entry the peer is gone."""

    def __init__(self) -> None:
        self.room: dict[bytes, int] = {}
        self.received: list[tuple[bytes, bytes]] = []

    def send(self, peer: bytes, data: bytes) -> bool | None:
        if peer not in self.room:
            return False
        if not self.room[peer]:
            return None
        self.room[peer] -= 1
        self.received.append((peer, data))
        return True


@pytest.fixture
def peers() -> Peers:
    return Peers()


@pytest.fixture
def backlogs(peers: Peers) -> Backlogs:
    return Backlogs(peers.send)


def test_what_waits_is_sent_in_order_as_far_as_there_is_room(peers: Peers, backlogs: Backlogs) -> None:
    """Nothing overtakes, nothing is sent twice, and a peer without messages has no backlog."""
    peers.room[b"a"] = 0
    for turn in range(5):
        assert backlogs.add(b"a", b"%d" % turn)
    backlogs.flush()
    assert peers.received == []
    peers.room[b"a"] = 2
    backlogs.flush()
    assert [data for _, data in peers.received] == [b"0", b"1"]
    assert b"a" in backlogs
    peers.room[b"a"] = 9
    backlogs.flush()
    assert [data for _, data in peers.received] == [b"0", b"1", b"2", b"3", b"4"]
    assert b"a" not in backlogs
    assert not backlogs


def test_one_that_does_not_read_keeps_nobody_waiting(peers: Peers, backlogs: Backlogs) -> None:
    """Each peer's messages are sent as soon as it has room, regardless of who came first."""
    peers.room |= {b"a": 0, b"b": 1}
    backlogs.add(b"a", b"1")
    backlogs.add(b"b", b"2")
    backlogs.flush()
    assert peers.received == [(b"b", b"2")]
    assert len(backlogs) == 1


def test_peers_have_their_turns(peers: Peers, backlogs: Backlogs) -> None:
    """``flush_next`` tries the peers in turn; without any it does nothing."""
    backlogs.flush_next()
    for peer in (b"a", b"b", b"c"):
        peers.room[peer] = 0
        backlogs.add(peer, peer)
    backlogs.flush_next()
    peers.room |= dict.fromkeys((b"a", b"b", b"c"), 1)
    for _ in range(3):
        backlogs.flush_next()
    assert [peer for peer, _ in peers.received] == [b"b", b"c", b"a"]
    assert not backlogs


@pytest.mark.parametrize(("size", "limit"), [(0, QUEUE_LIMIT), (1 << 16, QUEUED_BYTES_LIMIT >> 16)])
def test_what_one_peer_leaves_unread_is_bounded(peers: Peers, backlogs: Backlogs, size: int, limit: int) -> None:
    """10 000 messages or 16 MiB; read messages no longer count."""
    peers.room[b"a"] = 0
    data = bytes(size)
    assert all(backlogs.add(b"a", data) for _ in range(limit))
    peers.room[b"a"] = 10
    backlogs.flush()
    assert all(backlogs.add(b"a", data) for _ in range(10))
    assert not backlogs.add(b"a", data)


def test_what_waits_for_a_peer_that_is_gone_goes_too(peers: Peers, backlogs: Backlogs) -> None:
    """The backlog doesn't try to send to it again."""
    backlogs.add(b"a", b"1")
    backlogs.add(b"a", b"2")
    backlogs.flush()
    assert not backlogs
    assert peers.received == []


def test_a_client_that_leaves_gets_its_last_messages(peers: Peers, backlogs: Backlogs) -> None:
    """The backlog still sends them when the client reads; it takes no new ones."""
    peers.room[b"a"] = 0
    backlogs.add(b"a", b"goodbye")
    backlogs.leave(b"a")
    assert not backlogs.add(b"a", b"more")
    assert b"a" in backlogs
    peers.room[b"a"] = 9
    backlogs.flush_next()
    assert peers.received == [(b"a", b"goodbye")]
    assert not backlogs
    assert backlogs.add(b"a", b"again a client")


def test_a_client_that_leaves_with_too_much_unread_gets_none_of_it(peers: Peers, backlogs: Backlogs) -> None:
    """Otherwise it could come back and leave as much again, any number of times."""
    peers.room[b"a"] = 0
    backlogs.add(b"a", bytes(LEAVING_BYTES_LIMIT + 1))
    backlogs.leave(b"a")
    assert not backlogs
    backlogs.leave(b"nobody")
    assert not backlogs


def test_only_so_many_that_have_left_are_remembered(peers: Peers, backlogs: Backlogs) -> None:
    """The limit drops the ones that left first."""
    for turn in range(LEAVING_LIMIT + 3):
        peer = b"%d" % turn
        peers.room[peer] = 0
        backlogs.add(peer, b"goodbye")
        backlogs.leave(peer)
    assert len(backlogs) == LEAVING_LIMIT
    assert b"2" not in backlogs
    assert b"3" in backlogs
