"""``AsyncServer``: how it stops, and how its clients disconnect; on both channels and loops."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmtransport import AsyncClient, AsyncServer, ChannelKind, Client, ConnectRefused, PeerDied, TransportError
from tests.support.helpers import DeliberateError, eventually
from tests.support.loops import (
    ARENA_BYTES,
    Gate,
    Run,
    becomes,
    in_each_loop,
    on_each_channel,
    served,
    serving,
    settle,
    wholly_free,
)
from tests.support.process import ROOT, Process

pytestmark = [in_each_loop, on_each_channel, pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_unhandled")]

SERVER = ROOT / "tests/support/processes/either_server.py"
CLIENT = ROOT / "tests/support/processes/holding_client.py"
Spawn = Callable[..., Process]

# Stopping


def test_what_had_come_before_stop_is_answered(run: Run, channel: ChannelKind, address: str) -> None:
    """Hundreds of calls in progress, in coroutines and in a thread; then the client is told."""
    gate = Gate()

    def block(value: int) -> int:
        gate.wait()
        return value

    async def hold(value: int) -> int:
        await gate.passed()
        return value

    async def main() -> None:
        async with served(address, options={"max_calls_in_progress": 1000}, block=block, hold=hold) as server:
            client = await AsyncClient(address, channel=channel).connect()
            calls = [client.call("block", 0), *(client.call("hold", i) for i in range(1, 200))]
            tasks = [asyncio.create_task(call) for call in calls]
            assert await becomes(lambda: gate.entered == 200)
            server.stop()
            await settle()
            gate.open()
        assert await asyncio.gather(*tasks) == list(range(200))
        with pytest.raises(PeerDied, match="ended the connection"):
            await client.call("echo", 1)
        await client.close()

    run(main())


def test_calls_that_go_on_for_too_long_are_cut(run: Run, channel: ChannelKind, address: str) -> None:
    """After ``drain_timeout_s`` the coroutines are cancelled, and their callers get ``PeerDied``."""
    cut: list[int] = []

    async def hang(value: int) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cut.append(value)
            raise

    async def main() -> None:
        server = AsyncServer(address, drain_timeout_s=0.2)
        server.register("hang", hang)
        async with server:
            task = asyncio.create_task(server.serve())
            client = await AsyncClient(address, channel=channel).connect()
            tasks = [asyncio.create_task(client.call("hang", i)) for i in range(3)]
            assert await becomes(lambda: server.statistics().in_flight_peak == 3)
            server.stop()
            await task
            assert await becomes(lambda: sorted(cut) == [0, 1, 2])
            assert not any(task.done() for task in tasks)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, PeerDied)
        await client.close()

    run(main())


def test_a_call_that_comes_while_others_end_is_answered_too(run: Run, channel: ChannelKind, address: str) -> None:
    """As long as ``drain_timeout_s`` has not passed."""
    first, second = Gate(), Gate()

    async def main() -> None:
        async with served(address, first=first.passed, second=second.passed) as server:
            client = await AsyncClient(address, channel=channel).connect()
            tasks = [asyncio.create_task(client.call("first"))]
            assert await becomes(lambda: first.entered == 1)
            server.stop()
            await settle()
            tasks.append(asyncio.create_task(client.call("second")))
            assert await becomes(lambda: second.entered == 1)
            first.open()
            await tasks[0]
            await settle()
            second.open()
        assert await asyncio.gather(*tasks) == [None, None]
        await client.close()

    run(main())


def test_closing_does_not_wait_for_blocking_handlers(run: Run, channel: ChannelKind, address: str) -> None:
    """However many fill the loop's threads: after ``drain_timeout_s`` clients are told and the socket is removed."""
    gate = Gate()

    async def main() -> None:
        async with served(address, options={"drain_timeout_s": 0.1}, block=gate.wait):
            client = await AsyncClient(address, channel=channel).connect()
            tasks = [asyncio.create_task(client.call("block")) for _ in range(60)]
            assert await becomes(lambda: gate.entered > 0)
            await settle()
        assert gate.left == 0
        assert not Path(address.removeprefix("ipc://")).exists()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, PeerDied)
        await client.close()
        gate.open()

    run(main())


def test_stop_is_heard_from_everywhere(run: Run, channel: ChannelKind, address: str) -> None:
    """From a handler of either kind, from another thread, and before ``serve``; closing again does nothing."""

    async def stopped_by(how: str) -> None:
        server = AsyncServer(address)

        async def stop() -> str:
            server.stop()
            return "stopped"

        server.register("coroutine", stop)
        server.register("thread", server.stop)
        if how == "before":
            server.stop()
        async with server:
            task = asyncio.create_task(server.serve())
            if how != "before":
                async with AsyncClient(address, channel=channel) as client:
                    if how == "elsewhere":
                        await asyncio.to_thread(server.stop)
                    else:
                        assert await client.call(how) == ("stopped" if how == "coroutine" else None)
                    await task
            await task
        await server.close()
        server.stop()

    for how in ("coroutine", "thread", "elsewhere", "before"):
        run(stopped_by(how))


def test_serving_can_be_cancelled(run: Run, channel: ChannelKind, address: str) -> None:
    """As any coroutine; closing then ends what is in progress, and the address is free for another server."""
    gate = Gate()

    async def main() -> None:
        server = AsyncServer(address)
        server.register("hold", gate.passed)
        client = AsyncClient(address, channel=channel)
        async with server:
            task = asyncio.create_task(server.serve())
            await client.connect()
            call = asyncio.create_task(client.call("hold"))
            assert await becomes(lambda: gate.entered == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        with pytest.raises(PeerDied):
            await call
        async with served(address):
            await client.reconnect()
            assert await client.call("echo", 1) == 1
        await client.close()

    run(main())


def test_nothing_is_read_after_the_end(run: Run, channel: ChannelKind, address: str) -> None:
    """A callback that a call's end had scheduled finds the channel closed, and leaves it alone."""

    async def main() -> None:
        server = AsyncServer(address)
        async with serving(server), AsyncClient(address, channel=channel):
            pass
        server._on_readable()

    run(main())


def test_a_flood_does_not_disturb_the_end(run: Run, channel: ChannelKind, address: str) -> None:
    """Clients that send as fast as they can until the server has gone: nothing is read from a channel being closed."""
    calls = [0, 0]

    def flood(number: int) -> TransportError:
        with Client(address, channel=channel) as client:
            try:
                while True:
                    pending = [client.submit("echo", i) for i in range(100)]
                    calls[number] += sum(reply.result() == i for i, reply in enumerate(pending))
            except TransportError as error:
                return error

    async def main() -> None:
        async with served(address, options={"drain_timeout_s": 0.2}):
            floods = [asyncio.create_task(asyncio.to_thread(flood, number)) for number in range(2)]
            assert await becomes(lambda: min(calls) > 200)
        for error in await asyncio.gather(*floods):
            assert isinstance(error, PeerDied)

    run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_process_in_order(
    run: Run, channel: ChannelKind, address: str, spawn: Spawn, number: int
) -> None:
    """The call in progress is answered, the exit code is 0, the socket is gone, the client gets ``PeerDied``."""
    server = spawn(SERVER, address, "AsyncServer" if run is asyncio.run else "uvloop")

    async def main() -> None:
        client = await AsyncClient(address, channel=channel).connect()
        held = await client.call("fill", 100, 7)
        nap = asyncio.create_task(client.call("nap", 0.15))
        assert await client.call("echo", 1) == 1
        server.signal(number)
        assert await nap == 0.15
        assert await asyncio.to_thread(server.readline) == "left 1"
        assert await asyncio.to_thread(server.readline) == "stopped"
        assert await asyncio.to_thread(server.wait) == 0
        assert not Path(address.removeprefix("ipc://")).exists()
        with pytest.raises(PeerDied):
            await client.call("echo", 1)
        assert (held == 7).all()
        await client.close()

    run(main())


# The ends of clients


def test_a_killed_client_is_dropped(run: Run, channel: ChannelKind, address: str, spawn: Spawn) -> None:
    """Its share is free for the next client at once; its calls in progress finish without a caller."""
    gate = Gate()
    left: list[int] = []

    async def nap(_seconds: float) -> None:
        await gate.passed()

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES}
        async with served(address, options={"max_total_arena_bytes": 2 * ARENA_BYTES}, nap=nap) as server:
            server.on_disconnect(left.append)
            client = await asyncio.to_thread(spawn, CLIENT, address, channel, str(ARENA_BYTES))
            assert await becomes(lambda: gate.entered == 2)
            with pytest.raises(ConnectRefused):
                await AsyncClient(address, **options).connect()
            client.signal(signal.SIGKILL)
            assert await becomes(lambda: left == [1])
            async with AsyncClient(address, **options) as other:
                assert await wholly_free(other)
                gate.open()
                assert await becomes(lambda: gate.left == 2)
                assert await wholly_free(other)
                assert server.statistics().failures == 0

    run(main())


def test_whoever_leaves_is_told_of_once(run: Run, channel: ChannelKind, address: str) -> None:
    """Every callback gets the number that handlers knew the client by; one that raises doesn't affect the others."""
    left: list[int] = []

    def fail(_number: int) -> None:
        raise DeliberateError("in a callback")

    async def main() -> None:
        async with served(address) as server:
            server.on_disconnect(fail)
            server.on_disconnect(left.append)
            for number in (1, 2):
                async with AsyncClient(address, channel=channel) as client:
                    assert await client.call("connection") == number
                assert await becomes(lambda: len(left) == number)  # noqa: B023
            last = await AsyncClient(address, channel=channel).connect()
        assert left == [1, 2, 3], "the one that is there when the server closes, too"
        await last.close()

    run(main())


# What is left


def _held() -> tuple[int, int, int]:
    """How many file descriptors, threads and mapped segments this process has."""
    with open("/proc/self/maps") as maps:
        mapped = sum("/dev/shm/shmtransport-" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mapped


def test_no_thread_descriptor_or_memory_is_left(
    run: Run, channel: ChannelKind, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether clients and servers were closed, cancelled, refused or abandoned by the other side."""
    caplog.set_level(logging.CRITICAL, "shmtransport")  # captured records hold tracebacks
    others, (*_, others_mapped) = set(threading.enumerate()), _held()

    def fail() -> None:
        raise DeliberateError

    async def main() -> None:
        gate = Gate()
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES}
        handlers = {"fail": fail, "hold": gate.passed}
        async with served(address, options={"max_clients": 2, "drain_timeout_s": 0.0}, **handlers):
            left_alone = await AsyncClient(address, **options).connect()
            async with AsyncClient(address, **options) as client:
                assert await wholly_free(client)
                calls = [asyncio.create_task(client.call(name)) for name in ("hold", "fail", "missing", "hold")]
                assert await becomes(lambda: gate.entered == 2)
                calls[0].cancel()
                with pytest.raises(ConnectRefused):
                    await AsyncClient(address, **options).connect()
                await client.reconnect()
                await asyncio.gather(*calls, return_exceptions=True)
            connecting = asyncio.create_task(AsyncClient(address, connect_timeout_s=0.3, **options).connect())
            await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.wait([connecting])
        await asyncio.sleep(0.01)  # it hears of the server's end
        await left_alone.close()

    run(main())
    gc.collect()
    before = _held()
    for _ in range(3):
        run(main())

    def gone() -> bool:
        gc.collect()
        ours = [one for one in threading.enumerate() if one.name.startswith("shmtransport") and one not in others]
        return not ours and all(now <= then for now, then in zip(_held(), (*before[:2], others_mapped), strict=True))

    assert eventually(gone), f"{_held()} file descriptors, threads, segments; before: {before}"
