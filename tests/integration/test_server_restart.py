"""A server that ends while a client connects, or later: its successor answers, and its names are removed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future

import pytest

import shmtransport.endpoints.client_connection
from shmtransport import AsyncClient, Client, PeerDied
from shmtransport.core import Counters
from shmtransport.endpoints.connection_memory import ConnectionMemory
from shmtransport.endpoints.handshake import client_handshake
from shmtransport.endpoints.options import ClientOptions
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import Spawn, in_thread, start_server
from tests.support.process import ROOT, Process

pytestmark = pytest.mark.timeout(60)

SILENT = ROOT / "tests/support/processes/silent_server.py"
CONNECT_S = 20.0
SOON_S = 8.0  # far less than that, though a time-out of the test alone
GAP_S = 0.15


def kill(server: Process) -> None:
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL


def names() -> set[str]:
    """What has a name in /dev/shm."""
    return {name for name in os.listdir("/dev/shm") if "shmtransport-" in name}


def connect_and_ask(address: str, channel: ChannelKind) -> int:
    """Which process answers a new client."""
    with Client(address, channel=channel, connect_timeout_s=CONNECT_S) as client:
        pid: int = client.call("pid")
        return pid


def connect_and_ask_in_a_loop(address: str, channel: ChannelKind) -> int:
    async def ask() -> int:
        async with AsyncClient(address, channel=channel, connect_timeout_s=CONNECT_S) as client:
            pid: int = await client.call("pid")
            return pid

    return asyncio.run(ask())


Ask = Callable[[str, ChannelKind], int]


@pytest.fixture(params=[connect_and_ask, connect_and_ask_in_a_loop], ids=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    function: Ask = request.param
    return function


def assert_succeeded(spawn: Spawn, address: str, asking: Future[int]) -> None:
    """A server that comes a moment later is the one that answers."""
    time.sleep(GAP_S)
    successor = start_server(spawn, address)
    assert asking.result(SOON_S) == successor.pid


@pytest.mark.parametrize("heard", ["Hello", "Attach"])
def test_a_server_is_killed_that_has_heard_of_the_client(
    spawn: Spawn, address: str, channel: ChannelKind, ask: Ask, heard: str
) -> None:
    """The messages it received are lost with it: the client starts over with its successor."""
    server = spawn(SILENT, address, heard)
    asking = in_thread(ask, address, channel)
    assert server.readline() == f"heard {heard}"
    kill(server)
    assert_succeeded(spawn, address, asking)


def test_a_server_is_killed_that_had_stopped(spawn: Spawn, address: str, channel: ChannelKind, ask: Ask) -> None:
    """It had accepted nothing, or had not read what it accepted."""
    server = start_server(spawn, address)
    server.signal(signal.SIGSTOP)
    asking = in_thread(ask, address, channel)
    time.sleep(GAP_S)
    assert not asking.done()
    kill(server)
    assert_succeeded(spawn, address, asking)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_is_restarted_between_offer_and_attach(
    spawn: Spawn, address: str, channel: ChannelKind, how: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor gets an Attach of a client that it doesn't know, or the client sees the connection break."""
    servers = [start_server(spawn, address)]

    def interrupted(
        options: ClientOptions, claim_timeout_s: float, counters: Counters, _new_copies: None
    ) -> Generator[bytes, bytes, ConnectionMemory]:
        """The client's half; once, the server is replaced before the client answers its Offer."""
        ours = client_handshake(options, claim_timeout_s, counters)
        offer = yield next(ours)
        if len(servers) == 1:
            servers[0].signal(how)
            servers[0].wait()
            servers.append(start_server(spawn, address))
            time.sleep(2 * GAP_S)  # ZeroMQ connects to it by itself
        attach = ours.send(offer)
        try:
            ours.send((yield attach))
        except StopIteration as end:
            connection: ConnectionMemory = end.value
            return connection
        raise AssertionError("the handshake goes on for longer than it should")

    monkeypatch.setattr(shmtransport.endpoints.client_connection, "client_handshake", interrupted)
    assert in_thread(connect_and_ask, address, channel).result(SOON_S) == servers[1].pid


def test_a_server_that_is_killed_just_after_its_welcome_has_died(
    spawn: Spawn, address: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PeerDied, long before connecting would take too long, and none of its names is left."""
    before = names()
    server = start_server(spawn, address)

    def interrupted(
        options: ClientOptions, claim_timeout_s: float, counters: Counters, _new_copies: None
    ) -> Generator[bytes, bytes, ConnectionMemory]:
        """The client's half; the server is killed before the client acts on its Welcome."""
        ours = client_handshake(options, claim_timeout_s, counters)
        attach = ours.send((yield next(ours)))
        welcome = yield attach
        kill(server)
        try:
            ours.send(welcome)
        except StopIteration as end:
            connection: ConnectionMemory = end.value
            return connection
        raise AssertionError("the handshake goes on for longer than it should")

    monkeypatch.setattr(shmtransport.endpoints.client_connection, "client_handshake", interrupted)
    with pytest.raises(PeerDied, match="ended during the handshake"):
        in_thread(connect_and_ask, address, channel).result(SOON_S)
    assert names() == before


# What a killed server leaves


def test_several_clients_notice_a_killed_server_at_once(spawn: Spawn, address: str) -> None:
    """Each hears of it; nothing with a name is left, and a new server serves others."""
    before = names()
    server = start_server(spawn, address)
    clients = [Client(address, channel="doorbell") for _ in range(4)]
    calls = [in_thread(client.call, "sleep", 60) for client in clients]
    time.sleep(0.1)
    kill(server)
    for call in calls:
        with pytest.raises(PeerDied):
            call.result(SOON_S)
    assert names() == before
    start_server(spawn, address)
    with Client(address, channel="doorbell") as another:
        another.call("echo")
        for client in clients:
            client.close()
        assert names() == before
        with Client(address, channel="doorbell") as late:
            assert late.call("echo", 1) == 1
