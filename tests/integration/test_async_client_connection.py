"""``AsyncClient``: how connections begin and end, in order and not; on both channels and loops."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shmtransport import (
    AddressError,
    AsyncClient,
    AsyncServer,
    CallTimeout,
    ChannelKind,
    Closed,
    ConnectRefused,
    ConnectTimeout,
    LocalProtocolError,
    PeerDied,
    PeerProtocolError,
)
from tests.support.loops import (
    ARENA_BYTES,
    AnyServer,
    Gate,
    Run,
    becomes,
    by_each_server,
    in_each_loop,
    on_each_channel,
    served,
    server_for,
    serving,
    settle,
    wholly_free,
)
from tests.support.process import ROOT, Process

pytestmark = [in_each_loop, on_each_channel, pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_unhandled")]

SERVER = ROOT / "tests/support/processes/either_server.py"
Spawn = Callable[..., Process]


async def ended(client: AsyncClient) -> bool:
    """Whether the client notices by itself, without being used, that its server has ended."""

    def gone() -> bool:
        try:
            return client.server_pid < 0
        except PeerDied:
            return True

    return await becomes(gone)


# Connecting


def test_nothing_can_be_used_before_connecting(run: Run, channel: ChannelKind, address: str) -> None:
    """``Closed`` says what to do; making the object needs neither a loop nor a server."""
    client = AsyncClient(address, channel=channel)
    assert (client.channel, client.scheme) == (channel, "ipc")
    with pytest.raises(Closed, match=r"not connected yet: use it in an 'async with' block, or await connect\(\)"):
        client.empty((1,), torch.uint8)
    with pytest.raises(Closed, match="not connected yet"):
        _ = client.server_pid

    async def main() -> None:
        with pytest.raises(Closed, match="not connected yet"):
            await client.call("echo", 1)
        await client.close()
        async with served(address), client as entered:
            assert entered is client
            assert await client.call("echo", 1) == 1

    run(main())


def test_a_second_connect_is_refused(run: Run, channel: ChannelKind, address: str) -> None:
    """It names reconnect(), and leaves the connection alone; ``async with`` on a connected client is no second one."""

    async def main() -> None:
        async with served(address):
            client = await AsyncClient(address, channel=channel).connect()
            with pytest.raises(LocalProtocolError, match=r"use reconnect\(\)"):
                await client.connect()
            async with client:
                assert await client.call("connection") == 1

    run(main())


def test_who_connects_or_reconnects_at_once_takes_turns(run: Run, channel: ChannelKind, address: str) -> None:
    """Of two connects at once one is refused; of two reconnects at once neither leaks a connection."""
    left: list[int] = []

    async def main() -> None:
        async with served(address) as server:
            server.on_disconnect(left.append)
            client = AsyncClient(address, channel=channel)
            outcomes = await asyncio.gather(client.connect(), client.connect(), return_exceptions=True)
            assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AsyncClient", "LocalProtocolError"]
            assert await client.call("connection") == 1
            await asyncio.gather(client.reconnect(), client.reconnect())
            assert await client.call("connection") == 3
            await asyncio.gather(client.reconnect(), client.close(), client.close())
            with pytest.raises(Closed):
                await client.call("echo", 1)
            assert await becomes(lambda: left == [1, 2, 3, 4])

    run(main())


def test_connecting_says_why_it_failed_and_may_be_tried_again(run: Run, channel: ChannelKind, address: str) -> None:
    """As with ``Client``: no server, a refusal, an impossible address; afterwards connecting works."""

    async def main() -> None:
        client = AsyncClient(address, channel=channel, connect_timeout_s=0.5, arena_bytes=ARENA_BYTES)
        with pytest.raises(ConnectTimeout, match=r"no server answered at .* within 0\.5 s"):
            await client.connect()
        async with served(address, options={"max_arena_bytes": 1000}):
            with pytest.raises(ConnectRefused, match=r"max_arena_bytes is 1000 bytes"):
                async with client:
                    pytest.fail("it was refused")
        async with served(address), client:
            assert await wholly_free(client)
        with pytest.raises(AddressError):
            AsyncClient("tcp://example.com:1234", channel=channel)

    run(main())


def test_connecting_can_be_cancelled(run: Run, channel: ChannelKind, address: str) -> None:
    """It takes effect before the server answers; the server later finds the client gone and frees its place."""

    async def main() -> None:
        client = AsyncClient(address, channel=channel, connect_timeout_s=30.0)
        server = AsyncServer(address, max_clients=1)
        server.register("connection", lambda: server.connection_id)
        connecting = asyncio.create_task(client.connect())
        await asyncio.sleep(0.05)
        assert not connecting.done(), "no server runs yet"
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        async with serving(server), await connected_within(client):
            # 2 where the server began before the cancelling took effect.
            assert await client.call("connection") in (1, 2)

    run(main())


async def connected_within(client: AsyncClient, within_s: float = 20.0) -> AsyncClient:
    """Connect as soon as there is room; ZeroMQ keeps no order between what two sockets have sent."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await client.connect()
        except ConnectRefused:  # noqa: PERF203
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


# Closing


def test_a_closed_client_can_not_be_used(run: Run, channel: ChannelKind, address: str) -> None:
    """Calls in flight, those that wait for room and all later ones fail with ``Closed``; results stay valid."""
    gate = Gate()

    async def keep(_x: torch.Tensor) -> None:
        await gate.passed()

    async def main() -> None:
        async with served(address, keep=keep):
            client = AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES)
            async with client:
                held = await client.call("fill", ARENA_BYTES, 4)
                loan = client.empty((ARENA_BYTES,), torch.uint8)
                tasks = [asyncio.create_task(client.call("keep", loan)) for _ in range(3)]
                assert await becomes(lambda: gate.entered == 3)
                tasks.append(asyncio.create_task(client.call("echo", torch.zeros(1))))
                assert await becomes(lambda: client.statistics().stalls == 1)
            for task in tasks:
                with pytest.raises(Closed, match="this client was closed"):
                    await task
            for use in (lambda: client.empty((1,), torch.uint8), lambda: client.server_pid):
                with pytest.raises(Closed, match="this client was closed"):
                    use()
            with pytest.raises(Closed, match="this client was closed"):
                await client.call("echo", 1)
            await client.close()
            assert (held == 4).all()
            gate.open()

    run(main())


def test_cancelling_close_still_closes(run: Run, channel: ChannelKind, address: str) -> None:
    """And a second close waits for the end of the first."""
    left: list[int] = []

    async def main() -> None:
        async with served(address) as server:
            server.on_disconnect(left.append)
            client = await AsyncClient(address, channel=channel).connect()
            closing = asyncio.create_task(client.close())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            await client.close()
            assert await becomes(lambda: left == [1])

    run(main())


@by_each_server
def test_reconnecting_gives_a_new_connection(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """Calls in flight fail with ``Closed``; old results and loans stay valid, and a loan is then copied when sent."""
    gate = Gate()

    async def main() -> None:
        async with (
            served(address, kind, hold=gate.wait),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            held = await client.call("fill", ARENA_BYTES, 4)
            loan = client.empty((100,), torch.uint8).fill_(5)
            flying = asyncio.create_task(client.call("hold"))
            assert await becomes(lambda: gate.entered == 1)
            reconnecting = asyncio.create_task(client.reconnect())
            with pytest.raises(Closed, match="reconnects"):
                await flying
            gate.open()
            await reconnecting
            assert await client.call("connection") == 2
            assert (await client.call("double", loan)).tolist() == [10] * 100
            assert client.statistics().bytes_copied == 100
            assert (held == 4).all()
            assert await wholly_free(client)

    run(main())


# The server's end


@by_each_server
def test_an_orderly_end_of_the_server_is_told(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """Its goodbye ends the connection with ``PeerDied``, for calls in flight and for all later use."""

    async def main() -> None:
        async with served(address, kind):
            client = await AsyncClient(address, channel=channel).connect()
            held = await client.call("fill", 10, 6)
        assert await ended(client)
        for _ in range(2):
            with pytest.raises(PeerDied, match="ended the connection"):
                await client.call("echo", 1)
        with pytest.raises(PeerDied):
            client.empty((1,), torch.uint8)
        await client.close()
        with pytest.raises(PeerDied):
            await client.call("echo", 1)
        assert (held == 6).all()

    run(main())


def test_a_server_killed_while_calls_are_in_flight_is_noticed(
    run: Run, channel: ChannelKind, address: str, spawn: Spawn
) -> None:
    """All of them fail with ``PeerDied``, those that wait for room too; a new server gets the client by reconnect()."""
    kind = server_for(run, channel)
    server = spawn(SERVER, address, kind.__name__)

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES, "timeout_s": 3600.0}
        async with AsyncClient(address, **options) as client:
            held = await client.call("fill", ARENA_BYTES, 7)
            loan = client.empty((ARENA_BYTES,), torch.uint8)
            calls = [client.call("nap", 3600.0, loan), client.call("echo", torch.zeros(1))]
            tasks = [asyncio.create_task(call) for call in calls]
            del loan
            await settle()
            server.signal(signal.SIGKILL)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [PeerDied] * 2
            del outcomes, tasks
            patient = client._options
            client._options = replace(patient, connect_timeout_s=0.2)
            with pytest.raises(ConnectTimeout):
                await client.reconnect()
            client._options = patient
            with pytest.raises(PeerDied):
                await client.call("echo", 1)
            spawn(SERVER, address, kind.__name__)
            await client.reconnect()
            assert await wholly_free(client)
            assert (held == 7).all()

    run(main())


def test_a_server_killed_between_calls_is_noticed_without_one(
    run: Run, channel: ChannelKind, address: str, spawn: Spawn
) -> None:
    """The loop is told by the kernel; no call is needed to find out."""
    kind = server_for(run, channel)
    server = spawn(SERVER, address, kind.__name__)

    async def main() -> None:
        async with AsyncClient(address, channel=channel) as client:
            assert await client.call("echo", 1) == 1
            assert client.server_pid == server.pid
            server.signal(signal.SIGKILL)
            assert await ended(client)
            with pytest.raises(PeerDied, match=rf"process {server.pid}\) has ended"):
                await client.call("echo", 1)

    run(main())


def test_a_stopped_server_is_alive(run: Run, channel: ChannelKind, address: str, spawn: Spawn) -> None:
    """SIGSTOP is a ``CallTimeout``, not death; after SIGCONT the connection works, and late replies are released."""
    kind = server_for(run, channel)
    server = spawn(SERVER, address, kind.__name__)

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES}
        async with (
            AsyncClient(address, timeout_s=0.1, **options) as hasty,
            AsyncClient(address, timeout_s=50.0, **options) as patient,
        ):
            server.signal(signal.SIGSTOP)
            waiting = asyncio.create_task(patient.call("fill", ARENA_BYTES))
            with pytest.raises(CallTimeout, match="alive"):
                await hasty.call("fill", ARENA_BYTES)
            assert not waiting.done()
            server.signal(signal.SIGCONT)
            assert (await waiting).numel() == ARENA_BYTES
            del waiting
            await settle()
            assert await wholly_free(patient)

    run(main())


def test_a_server_that_breaks_the_protocol_is_left(run: Run, channel: ChannelKind, address: str) -> None:
    """Calls in flight and all later ones raise ``PeerProtocolError``; the client says goodbye to the server."""
    left: list[int] = []
    gate = Gate()

    async def main() -> None:
        async with served(address, hold=gate.passed) as server, AsyncClient(address, channel=channel) as client:
            server.on_disconnect(left.append)

            @server.method
            async def break_it() -> None:
                server._channel.send(server._caller().client_key, b"\xc1 is no message")

            calls = [asyncio.create_task(client.call("hold")), asyncio.create_task(client.call("break_it"))]
            for call in calls:
                with pytest.raises(PeerProtocolError):
                    await call
            with pytest.raises(PeerProtocolError):
                await client.call("echo", 1)
            assert await becomes(lambda: left == [1])
            gate.open()

    run(main())
