"""``Client`` beside its calls: closing, and ``reconnect`` after a server's restart."""

from __future__ import annotations

import gc
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from shmtransport import Client, Closed, ConnectTimeout, PeerDied
from shmtransport.core import Counters
from shmtransport.endpoints.client_connection import Connecting
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import (
    KIB,
    MIB,
    Spawn,
    eventually,
    in_thread,
    mapped_segments,
    start_server,
)

# The end of a client

pytestmark = pytest.mark.timeout(60)


def test_after_close_every_use_raises_closed(shared_server: str, channel: ChannelKind) -> None:
    """call, submit and empty say Closed; a second close does nothing."""
    client = Client(shared_server, channel=channel)
    client.call("echo", 1)
    client.close()
    client.close()
    for use in (
        lambda: client.call("echo", 1),
        lambda: client.submit("echo"),
        lambda: client.empty((1,), torch.uint8),
        lambda: client.server_pid,
    ):
        with pytest.raises(Closed):
            use()
    assert client.statistics().calls == 1


def test_calls_in_flight_fail_with_closed(shared_server: str, channel: ChannelKind) -> None:
    """A pending reply of a closed client raises at once."""
    client = Client(shared_server, channel=channel)
    pending = client.submit("sleep", 0.2)
    client.close()
    assert pending.done()
    with pytest.raises(Closed):
        pending.result()


def test_results_and_loans_stay_valid_after_close(shared_server: str, channel: ChannelKind) -> None:
    """Tensors keep the memory they look into; dropping them then is safe too."""
    with Client(shared_server, channel=channel, arena_bytes=MIB) as client:
        result = client.call("fill", 1000, 3.0)
        array = client.call("echo", np.arange(10))
        loan = client.empty((1000,), torch.float32).fill_(4)
    del client
    gc.collect()
    with Client(shared_server, channel=channel, arena_bytes=MIB) as other:
        other.call("fill", 1000, 5.0)
    assert torch.equal(result, torch.full((1000,), 3.0))
    assert array.tolist() == list(range(10))
    assert torch.equal(loan, torch.full((1000,), 4.0))
    result += 1  # it is ordinary memory
    del result, array, loan
    gc.collect()


def test_the_context_manager_closes_also_on_an_error(shared_server: str, channel: ChannelKind) -> None:
    """The error itself passes through."""
    with pytest.raises(ZeroDivisionError), Client(shared_server, channel=channel) as client:
        _ = 1 / 0
    with pytest.raises(Closed):
        client.call("echo")


def test_a_client_can_connect_again_and_again(shared_server: str, channel: ChannelKind) -> None:
    """50 connections in turn leave nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        with Client(shared_server, channel=channel, arena_bytes=4096) as client:
            assert client.call("echo", i) == i
    del client
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# The server's interface


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_reconnect_restores_service_after_a_restart(
    spawn: Spawn, address: str, channel: ChannelKind, number: int
) -> None:
    """Old results stay readable, an old loan arrives right on the new connection, statistics go on."""
    server = start_server(spawn, address)
    with Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=20.0) as client:
        held = client.call("fill", 1000, 7.0)
        loan = client.empty((1000,), torch.float32).fill_(3.0)
        assert client.call("total", loan) == 3000.0
        server.signal(number)
        server.wait()
        with pytest.raises(PeerDied):
            client.call("echo", 1)
        following = start_server(spawn, address)
        client.reconnect()
        assert client.server_pid == following.pid
        for i in range(50):  # several times round the arena
            assert torch.equal(client.call("double", loan), torch.full((1000,), 6.0))
            assert torch.equal(client.call("fill", 1000, float(i)), torch.full((1000,), float(i)))
        assert torch.equal(held, torch.full((1000,), 7.0))
        assert torch.equal(loan, torch.full((1000,), 3.0))
        mine = client.statistics()
        assert mine.tensors_copied == 50, "a loan of the old arena is copied"
        assert mine.calls == 102


def test_without_a_server_reconnect_times_out_and_can_be_tried_again(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """Until it succeeds every use says Closed; then all is well."""
    server = start_server(spawn, address)
    with Client(address, channel=channel) as client:
        client.call("echo")
        server.signal(signal.SIGKILL)
        server.wait()
        patient = client._exchange._connecting
        hasty = replace(client._options, connect_timeout_s=0.3)
        client._exchange._connecting = lambda: Connecting(address, hasty, 1.0, Counters())
        for _ in range(2):
            with pytest.raises(ConnectTimeout):
                client.reconnect()
            with pytest.raises((Closed, PeerDied)):
                client.call("echo")
        client._exchange._connecting = patient
        start_server(spawn, address)
        client.reconnect()
        assert client.call("echo", 1) == 1


def test_reconnecting_to_a_living_server_ends_calls_in_flight(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """They fail with Closed, also in other threads; the server counts one client that has left and one new one."""
    server = start_server(spawn, address, tells=True)
    with Client(address, channel=channel, timeout_s=50.0) as client:
        client.call("echo")
        pending = client.submit("sleep", 0.7)
        waiting = [in_thread(pending.result), *(in_thread(client.call, "sleep", 0.1) for _ in range(3))]
        assert eventually(lambda: client.statistics().in_flight_peak == 4)
        client.reconnect()
        for call in waiting:
            with pytest.raises(Closed, match="reconnects"):
                call.result(5.0)
        assert client.call("echo", 2) == 2
        assert server.readline() == "left 1"
        assert eventually(lambda: len(mapped_segments(server.pid)) == 2)


def test_several_threads_may_reconnect_at_once(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """As they do when each finds the server dead: one connection is left in the end, and it works."""
    server = start_server(spawn, address)
    with Client(address, channel=channel, timeout_s=50.0, connect_timeout_s=20.0) as client:
        waiting = in_thread(client.call, "sleep", 0.3)
        assert eventually(lambda: client.statistics().in_flight_peak == 1)
        for done in [in_thread(client.reconnect) for _ in range(4)]:
            done.result(20.0)
        with pytest.raises(Closed):
            waiting.result(5.0)
        assert client.call("echo", 1) == 1
        assert eventually(lambda: len(mapped_segments(server.pid)) == 2)


def test_a_closed_client_may_reconnect(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """``close`` ends a connection, not the client."""
    start_server(spawn, address)
    client = Client(address, channel=channel)
    client.close()
    with pytest.raises(Closed):
        client.call("echo")
    client.reconnect()
    with client:
        assert client.call("echo", 1) == 1
