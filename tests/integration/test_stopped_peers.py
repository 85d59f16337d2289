"""A stopped process (SIGSTOP) is alive: nobody drops it, and once it goes on the connection works as before."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from shmtransport import CallTimeout, Client, ConnectTimeout
from shmtransport.message import ChannelKind
from tests.conftest import Process

from .helpers import KIB, Spawn, start_client, start_server, undisturbed

pytestmark = pytest.mark.timeout(60)


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
                late.result(timeout_s=0.6)
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
        threading.Timer(0.5, server.signal, [signal.SIGCONT]).start()
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
