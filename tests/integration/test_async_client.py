"""``AsyncClient``: calls in flight, their cancellation and time-outs; on both channels and loops."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

import numpy as np
import pytest
import torch

from shmtransport import ArenaFull, AsyncClient, CallTimeout, ChannelKind, LocalProtocolError, RemoteError, Server
from shmtransport.units import MIB
from tests.support.helpers import DeliberateError
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
    wholly_free,
)

pytestmark = [in_each_loop, on_each_channel, pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_unhandled")]

needs_asyncio_timeout = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout is of Python 3.11")

# Calls in flight


@by_each_server
def test_many_calls_in_flight_each_get_their_own_reply(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """200 calls at once, of all sizes: every one is answered with its own result."""

    async def main() -> None:
        async with served(address, kind), AsyncClient(address, channel=channel, arena_bytes=16 * MIB) as client:
            sizes = [i * 37 % 5000 for i in range(200)]
            results = await asyncio.gather(
                *(client.call("double", torch.full((size,), i)) for i, size in enumerate(sizes))
            )
            for i, (size, result) in enumerate(zip(sizes, results, strict=True)):
                assert torch.equal(result, torch.full((size,), 2 * i))
            assert client.statistics().calls == 200
            assert client.statistics().in_flight_peak > 1

    run(main())


@by_each_server
def test_values_of_all_kinds_pass(run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]) -> None:
    """Nested values, numpy arrays, tensors without elements and of no dimension, exactly as they were."""

    async def main() -> None:
        async with served(address, kind), AsyncClient(address, channel=channel) as client:
            sent = {"a": [torch.arange(5), np.arange(3.0), None], "b": (True, "x", b"y", 2.5), "c": torch.tensor(3)}
            got = await client.call("echo", sent)
            assert torch.equal(got["a"][0], sent["a"][0])  # type: ignore[arg-type]
            assert np.array_equal(got["a"][1], np.arange(3.0))
            assert got["a"][2] is None
            assert got["b"] == (True, "x", b"y", 2.5)
            assert got["c"].item() == 3
            assert (await client.call("echo", torch.empty(0, 4))).shape == (0, 4)

    run(main())


def test_replies_may_come_in_another_order_than_requests(run: Run, channel: ChannelKind, address: str) -> None:
    """The last call's reply first: each task goes on as soon as its own is there."""
    gates = [Gate() for _ in range(20)]
    ended: list[int] = []

    async def hold(number: int) -> int:
        await gates[number].passed()
        return number

    async def main() -> None:
        async with served(address, hold=hold), AsyncClient(address, channel=channel) as client:

            async def ask(number: int) -> None:
                assert await client.call("hold", number) == number
                ended.append(number)

            tasks = [asyncio.create_task(ask(number)) for number in range(20)]
            for number in reversed(range(20)):
                gates[number].open()
                await tasks[number]
            assert ended == list(reversed(range(20)))

    run(main())


@by_each_server
def test_a_failed_call_fails_alone(run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]) -> None:
    """Of several calls in flight only that one raises."""

    def fail() -> None:
        raise DeliberateError("on purpose")

    async def main() -> None:
        async with served(address, kind, fail=fail), AsyncClient(address, channel=channel) as client:
            outcomes = await asyncio.gather(
                client.call("echo", 1), client.call("fail"), client.call("no such"), client.call("echo", 4),
                return_exceptions=True,
            )  # fmt: skip
            assert (outcomes[0], outcomes[3]) == (1, 4)
            assert isinstance(outcomes[1], RemoteError)
            assert (outcomes[1].type_name, outcomes[1].message) == ("DeliberateError", "on purpose")
            assert isinstance(outcomes[2], LocalProtocolError)
            with pytest.raises(LocalProtocolError):
                await client.call("echo", object())

    run(main())


def test_a_loan_is_sent_in_several_calls_at_once_and_never_copied(run: Run, channel: ChannelKind, address: str) -> None:
    """As with ``Client``: by descriptor, any number of times; its room is free once all calls are done with it."""

    async def main() -> None:
        async with served(address), AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
            loan = client.empty((ARENA_BYTES,), torch.uint8).fill_(3)
            assert await asyncio.gather(*(client.call("size", loan) for _ in range(20))) == [ARENA_BYTES] * 20
            assert client.statistics().bytes_copied == 0
            del loan
            assert await wholly_free(client)

    run(main())


# Cancellation


@by_each_server
def test_a_cancelled_calls_late_reply_is_released(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """The task ends at once; what request and reply held is free again once the server has answered after all."""
    gate = Gate()
    server: list[AnyServer] = []

    def late(x: torch.Tensor) -> torch.Tensor:
        gate.wait()
        return server[0].empty(x.shape, x.dtype).fill_(9)

    async def main() -> None:
        async with (
            served(address, kind, late=late) as made,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            server.append(made)
            task = asyncio.create_task(client.call("late", torch.zeros(ARENA_BYTES, dtype=torch.uint8)))
            assert await becomes(lambda: gate.entered == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            assert await becomes(lambda: made.statistics().calls == 1)
            assert await client.call("echo", 5) == 5, "so the late reply has come, too"
            assert await wholly_free(client)
            assert client.statistics().calls == 3, "the cancelled one does not count"

    run(main())


def test_a_call_that_is_cancelled_before_it_began_sends_nothing(run: Run, channel: ChannelKind, address: str) -> None:
    """A call that is cancelled right after it was sent doesn't disturb the others either."""

    async def main() -> None:
        async with (
            served(address) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            task = asyncio.create_task(client.call("echo", torch.zeros(100)))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await client.call("echo", 1) == 1
            assert server.statistics().calls == 1
            tasks = [asyncio.create_task(client.call("double", torch.full((100,), i))) for i in range(40)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for i, result in enumerate(results):
                if i % 2:
                    assert torch.equal(result, torch.full((100,), 2 * i))
                else:
                    assert isinstance(result, asyncio.CancelledError)
            del results, result, tasks, task
            assert await becomes(lambda: server.statistics().calls == 41)
            assert await client.call("echo", 2) == 2, "so all late replies have come"
            assert await wholly_free(client)

    run(main())


def test_a_call_that_waits_for_room_can_be_cancelled(run: Run, channel: ChannelKind, address: str) -> None:
    """It never reaches the server, and holds nothing of the arena."""
    gate = Gate()

    async def keep(x: torch.Tensor) -> int:
        await gate.passed()
        return x.numel()

    async def main() -> None:
        async with (
            served(address, keep=keep) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            first = asyncio.create_task(client.call("keep", torch.zeros(ARENA_BYTES, dtype=torch.uint8)))
            assert await becomes(lambda: gate.entered == 1)
            second = asyncio.create_task(client.call("size", torch.zeros(10)))
            assert await becomes(lambda: client.statistics().stalls == 1)
            assert not second.done()
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            gate.open()
            assert await first == ARENA_BYTES
            assert server.statistics().calls == 1
            assert await wholly_free(client)

    run(main())


# Time-outs


@needs_asyncio_timeout
def test_asyncio_timeout_ends_a_call(run: Run, channel: ChannelKind, address: str) -> None:
    """It is a ``TimeoutError``; the late reply is released, and the connection goes on."""

    async def main(gate: Gate) -> None:
        def late() -> torch.Tensor:
            gate.wait()
            return torch.zeros(ARENA_BYTES, dtype=torch.uint8)

        async with (
            served(address, late=late),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.call("late")
            async with asyncio.timeout(30):
                assert await client.call("echo", 1) == 1
            gate.open()
            assert await becomes(lambda: gate.left == gate.entered)
            assert await wholly_free(client)

    run(main(Gate()))


def test_wait_for_ends_a_call(run: Run, channel: ChannelKind, address: str) -> None:
    """The same with the older function."""

    async def main(gate: Gate) -> None:
        def late() -> torch.Tensor:
            gate.wait()
            return torch.zeros(ARENA_BYTES, dtype=torch.uint8)

        async with (
            served(address, late=late),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.call("late"), 0.05)
            assert await asyncio.wait_for(client.call("echo", 1), 30) == 1
            gate.open()
            assert await becomes(lambda: gate.left == gate.entered)
            assert await wholly_free(client)

    run(main(Gate()))


@by_each_server
def test_a_call_without_a_reply_in_time_is_a_call_timeout(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """After ``timeout_s``, saying that the server is alive; the late reply is thrown away and released."""
    gate = Gate()

    def late(x: torch.Tensor) -> torch.Tensor:
        gate.wait()
        return x

    async def main() -> None:
        options = {"channel": channel, "arena_bytes": ARENA_BYTES, "timeout_s": 0.1}
        async with served(address, kind, late=late), AsyncClient(address, **options) as client:  # type: ignore[arg-type]
            started = time.monotonic()
            with pytest.raises(CallTimeout, match=r"no reply to 'late' within 0\.1 s; 0 other calls.* is alive"):
                await client.call("late", torch.zeros(ARENA_BYTES, dtype=torch.uint8))
            assert time.monotonic() - started > 0.09  # uvloop's clock has milliseconds
            gate.open()
            assert await becomes(lambda: gate.left == 1)
            while True:
                with contextlib.suppress(ArenaFull, CallTimeout):  # until the late reply has come
                    if await wholly_free(client):
                        break

    run(main())


def test_a_reply_that_came_in_time_counts_though_the_loop_was_busy(
    run: Run, channel: ChannelKind, address: str
) -> None:
    """However long the loop was busy, beyond ``timeout_s`` too: a reply that has arrived is the result."""

    async def main() -> None:
        async with (
            served(address, Server) as server,
            AsyncClient(address, channel=channel, timeout_s=0.2) as client,
        ):
            task = asyncio.create_task(client.call("echo", 1))
            await asyncio.sleep(0)  # it is sent; from here on the loop does not look
            while server.statistics().calls == 0:
                time.sleep(0.001)
            time.sleep(0.25)
            assert await task == 1

    run(main())
