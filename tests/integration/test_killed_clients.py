"""A client that is killed (-9), at any moment: the server frees all that it held and says so, the others go on."""

from __future__ import annotations

import itertools
import signal
import time

import pytest
import torch

from shmtransport import Client
from shmtransport.message import ChannelKind

from .helpers import (
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

pytestmark = pytest.mark.timeout(60)

SHARE = 2 * MIB + 128 * KIB  # of a client with two arenas of 1 MiB, and of one with two of 64 KiB


@pytest.mark.parametrize(
    ("channel", "what"),
    [
        *itertools.product(("zmq", "doorbell"), ("idle", "hold", "call", "queue", "unread")),
        ("doorbell", "flood"),  # ZeroMQ takes 10000 messages before anybody waits
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
