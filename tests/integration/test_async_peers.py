"""``AsyncClient`` and ``AsyncServer`` on an unusual system or with a misbehaving peer; on both channels and loops."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import time
import types
from collections.abc import Callable

import pytest

from shmtransport import AsyncClient, ChannelKind, PeerDied, PeerProtocolError, Server
from tests.support.loops import (
    ARENA_BYTES,
    Gate,
    Run,
    becomes,
    in_each_loop,
    on_each_channel,
    served,
    server_for,
)
from tests.support.process import ROOT, Process
from tests.support.rings import CELL_BYTES

pytestmark = [in_each_loop, on_each_channel, pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_unhandled")]

SERVER = ROOT / "tests/support/processes/either_server.py"
CLIENT = ROOT / "tests/support/processes/holding_client.py"
Spawn = Callable[..., Process]
ASK_INTERVAL_S = 0.05  # not half a second


@pytest.fixture
def without_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel or in a container that offers no descriptor for the end of another process."""

    def missing(_pid: int) -> int:
        raise OSError

    odd = types.SimpleNamespace(**{**vars(os), "pidfd_open": missing})
    monkeypatch.setattr("shmtransport.memory.ownership.os", odd)
    for module in ("async_client", "async_server"):
        monkeypatch.setattr(f"shmtransport.endpoints.{module}.ASK_INTERVAL_S", ASK_INTERVAL_S)


@pytest.mark.usefixtures("without_pidfd")
def test_a_killed_server_is_noticed_without_a_descriptor(
    run: Run, channel: ChannelKind, address: str, spawn: Spawn
) -> None:
    """The client polls, even when it is not used: its call in flight ends with ``PeerDied``."""
    kind = server_for(run, channel)
    server = spawn(SERVER, address, kind.__name__)

    async def main() -> None:
        async with AsyncClient(address, channel=channel, timeout_s=3600.0) as client:
            assert await client.call("echo", 1) == 1
            nap = asyncio.create_task(client.call("nap", 3600.0))
            await asyncio.sleep(4 * ASK_INTERVAL_S)  # it has asked, and was told that the server lives
            assert not nap.done()
            server.signal(signal.SIGKILL)
            with pytest.raises(PeerDied, match="has ended"):
                await nap

    run(main())


@pytest.mark.usefixtures("without_pidfd")
def test_a_killed_client_is_noticed_without_a_descriptor(
    run: Run, channel: ChannelKind, address: str, spawn: Spawn
) -> None:
    """The server polls; a client that is alive stays connected."""
    left: list[int] = []

    async def nap(_seconds: float) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        async with served(address, nap=nap) as server, AsyncClient(address, channel=channel) as client:
            assert await client.call("connection") == 1
            server.on_disconnect(left.append)
            killed = await asyncio.to_thread(spawn, CLIENT, address, channel, str(ARENA_BYTES))
            await asyncio.sleep(4 * ASK_INTERVAL_S)
            assert left == []
            killed.signal(signal.SIGKILL)
            assert await becomes(lambda: left == [2])
            assert await client.call("connection") == 1

    run(main())


def test_a_reply_sent_before_the_servers_death_still_counts(
    run: Run, channel: ChannelKind, address: str, spawn: Spawn
) -> None:
    """The order in which the loop learns of the two doesn't matter."""
    kind = server_for(run, channel)
    server = spawn(SERVER, address, kind.__name__)

    async def main() -> None:
        async with AsyncClient(address, channel=channel) as client:
            await client.call("echo", 1)
            answered = asyncio.create_task(client.call("fill", 100, 5))
            await asyncio.sleep(0)  # it is sent; from here on the loop does not look
            time.sleep(0.5)
            server.signal(signal.SIGKILL)
            server.wait()
            assert (await answered).tolist() == [5] * 100
            with pytest.raises(PeerDied):
                await client.call("echo", 2)

    run(main())


def test_a_server_that_forges_its_count_of_requests_is_left(run: Run, channel: ChannelKind, address: str) -> None:
    """Impossible figures in its message ring raise ``PeerProtocolError``, for calls in flight too."""
    if channel == "zmq":
        pytest.skip("ZeroMQ has no message ring")
    gate = Gate()

    async def main() -> None:
        async with served(address, Server, block=gate.wait) as server, AsyncClient(address, channel=channel) as client:
            calls = [asyncio.create_task(client.call("block"))]
            assert await becomes(lambda: gate.entered == 1)
            (hosted,) = server._connections.values()
            assert hosted.memory.ring is not None
            struct.pack_into("<Q", hosted.memory._own.message_ring, CELL_BYTES, 1 << 40)  # how much it has read
            calls += [asyncio.create_task(client.call("echo", "x" * 60_000)) for _ in range(4)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, PeerProtocolError)
            with pytest.raises(PeerProtocolError, match="has read 1099511627776 bytes"):
                await client.call("echo", 1)
            gate.open()

    run(main())
