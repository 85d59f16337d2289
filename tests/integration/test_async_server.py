"""``AsyncServer``: handlers of both kinds, at the same time; for clients of both kinds, on both channels and loops."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch

from shmtransport import AsyncClient, AsyncServer, ChannelKind, Client, LocalProtocolError, RemoteError, Server
from shmtransport.endpoints import async_server
from shmtransport.protocol.messages import Goodbye, Refused
from tests.support.helpers import DeliberateError
from tests.support.loops import ARENA_BYTES, Gate, Run, becomes, in_each_loop, on_each_channel, served, wholly_free
from tests.support.strangers import Intruder, Stranger

pytestmark = [in_each_loop, on_each_channel, pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_unhandled")]

# Handlers at the same time


def test_coroutine_handlers_run_at_the_same_time(run: Run, channel: ChannelKind, address: str) -> None:
    """Calls of one client and of another meet each other: none ends before all of them have begun."""
    arrived: list[int] = []

    async def meet(number: int) -> int:
        arrived.append(number)
        while len(arrived) < 20:
            await asyncio.sleep(0.001)
        return number

    async def main() -> None:
        async with (
            served(address, meet=meet) as server,
            AsyncClient(address, channel=channel) as one,
            AsyncClient(address, channel=channel) as other,
        ):
            calls = [(one, other)[i % 2].call("meet", i) for i in range(20)]
            assert await asyncio.gather(*calls) == list(range(20))
            assert server.statistics().in_flight_peak == 20

    run(main())


def test_blocking_handlers_run_in_threads_beside_the_loop(run: Run, channel: ChannelKind, address: str) -> None:
    """Two handlers block until they meet, a third until the test lets it go; the server still answers coroutines."""
    gate = Gate()
    meeting = threading.Barrier(2)
    threads: list[str] = []

    def block() -> None:
        gate.wait()

    def meet() -> None:
        meeting.wait(30)

    async def where() -> str:
        return threading.current_thread().name

    async def main() -> None:
        async with (
            served(address, block=block, meet=meet, where=where),
            AsyncClient(address, channel=channel) as client,
        ):
            blocked = asyncio.create_task(client.call("block"))
            assert await asyncio.gather(client.call("meet"), client.call("meet")) == [None, None]
            threads.append(await client.call("where"))
            assert not blocked.done()
            gate.open()
            assert await blocked is None

    run(main())
    assert threads == [threading.current_thread().name]


def test_a_handler_may_be_anything_that_returns_an_awaitable(run: Run, channel: ChannelKind, address: str) -> None:
    """A partial of a coroutine function, a plain function that returns a coroutine, an object."""

    async def add(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    class Adder:
        async def __call__(self, a: int) -> int:
            return a + 3

    async def main() -> None:
        handlers = {"partial": functools.partial(add, 1), "plain": lambda b: add(2, b), "object": Adder()}
        async with served(address, **handlers), AsyncClient(address, channel=channel) as client:
            assert await client.call("partial", 10) == 11
            assert await client.call("plain", 10) == 12
            assert await client.call("object", 10) == 13

    run(main())


def test_both_kinds_of_handlers_know_their_caller(run: Run, channel: ChannelKind, address: str) -> None:
    """``connection_id`` and ``empty`` belong to the call, whatever else runs, and also in its tasks and threads."""

    async def main() -> None:
        async with (
            served(address) as server,
            AsyncClient(address, channel=channel) as one,
            AsyncClient(address, channel=channel) as other,
        ):
            assert isinstance(server, AsyncServer)

            def answer(value: int) -> list[Any]:
                return [server.connection_id, server.empty((4,), torch.int64).fill_(value)]

            async def coroutine(value: int) -> list[Any]:
                await asyncio.sleep(0.001)
                return answer(value)

            async def in_a_task(value: int) -> list[Any]:
                return await asyncio.create_task(coroutine(value))

            async def in_a_thread(value: int) -> list[Any]:
                return await asyncio.to_thread(answer, value)

            kinds: dict[str, Callable[..., Any]] = {
                "plain": answer, "coroutine": coroutine, "task": in_a_task, "thread": in_a_thread,
            }  # fmt: skip
            for name, handler in kinds.items():
                server.register(name, handler)
            for name in kinds:
                calls = [(one, other)[i % 2].call(name, i) for i in range(20)]
                for i, (number, tensor) in enumerate(await asyncio.gather(*calls)):
                    assert number == i % 2 + 1
                    assert tensor.tolist() == [i] * 4
            assert server.statistics().bytes_copied == 0, "what empty() gave was sent in place"
            for use in (lambda: server.connection_id, lambda: server.empty((1,), torch.uint8)):
                with pytest.raises(LocalProtocolError, match="only inside a handler"):
                    use()

    run(main())


def test_calls_beyond_the_limit_fail_and_no_others(run: Run, channel: ChannelKind, address: str) -> None:
    """Of one client's ten calls at once four are served; another client has its own four."""
    gate = Gate()

    async def hold(x: torch.Tensor) -> int:
        await gate.passed()
        return x.numel()

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES}
        async with (
            served(address, options={"max_calls_in_progress": 4}, hold=hold) as server,
            AsyncClient(address, **options) as one,
            AsyncClient(address, **options) as other,
        ):
            tasks = [asyncio.create_task(one.call("hold", torch.zeros(i))) for i in range(10)]
            assert await becomes(lambda: sum(task.done() for task in tasks) == 6)
            others = [asyncio.create_task(other.call("hold", torch.zeros(i))) for i in range(4)]
            assert await becomes(lambda: gate.entered == 8)
            gate.open()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert outcomes[:4] == [0, 1, 2, 3]
            for outcome in outcomes[4:]:
                assert isinstance(outcome, LocalProtocolError)
                assert "4 calls of this client are in progress; the server's max_calls_in_progress is 4" in str(outcome)
            del outcomes, outcome
            tasks.clear()
            assert await asyncio.gather(*others) == [0, 1, 2, 3]
            assert await one.call("hold", torch.zeros(7)) == 7, "there is room again"
            assert server.statistics().failures == 6
            assert await wholly_free(one)

    run(main())


# Errors


def test_what_a_handler_raises_is_its_callers_to_know(run: Run, channel: ChannelKind, address: str) -> None:
    """Type and text travel, from coroutines, threads and what they await; so does a handler's own cancellation."""

    def blocking() -> None:
        raise DeliberateError("in a thread")

    async def coroutine() -> None:
        await asyncio.sleep(0)
        raise DeliberateError("in the loop")

    async def cancelled() -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        task.cancel()
        await task

    async def main() -> None:
        handlers = {"blocking": blocking, "coroutine": coroutine, "cancelled": cancelled}
        async with served(address, **handlers) as server, AsyncClient(address, channel=channel) as client:
            for name, type_name, message in (
                ("blocking", "DeliberateError", "in a thread"),
                ("coroutine", "DeliberateError", "in the loop"),
                ("cancelled", "CancelledError", ""),
            ):
                with pytest.raises(RemoteError) as caught:
                    await client.call(name)
                assert (caught.value.type_name, caught.value.message) == (type_name, message)
            with pytest.raises(LocalProtocolError, match=r"there is no method 'missing'; there are: .*coroutine"):
                await client.call("missing")
            with pytest.raises(RemoteError, match="TypeError"):
                await client.call("coroutine", 1, 2)
            assert await client.call("echo", 1) == 1
            assert server.statistics().failures == 5

    run(main())


def test_a_malformed_message_costs_its_sender_only(run: Run, channel: ChannelKind, address: str) -> None:
    """A stranger is refused, a connected client is told goodbye and dropped; another's calls go on all the while."""
    gate = Gate()
    left: list[int] = []

    def misbehave() -> tuple[object, object]:
        stranger, intruder = Stranger(address), Intruder(address)
        try:
            stranger.send(b"\xc1 is no message")
            intruder.send(b"\xc1 is no message")
            return stranger.receive(), intruder.receive()
        finally:
            stranger.close()
            intruder.close()

    async def main() -> None:
        async with served(address, hold=gate.passed) as server, AsyncClient(address, channel=channel) as client:
            server.on_disconnect(left.append)
            task = asyncio.create_task(client.call("hold"))
            assert await becomes(lambda: gate.entered == 1)
            refused, goodbye = await asyncio.to_thread(misbehave)
            assert isinstance(refused, Refused)
            assert isinstance(goodbye, Goodbye)
            assert "protocol error" in goodbye.reason
            assert left == [2]
            assert await client.call("echo", 1) == 1
            gate.open()
            await task

    run(main())


# Room


class _Retentive(ThreadPoolExecutor):
    """Keeps every argument it was given, and every result, as an executor's threads do for a moment."""

    kept: ClassVar[list[Any]] = []

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future = super().submit(function, *arguments, **keywords)
        self.kept.append((function, arguments, keywords, future))
        return future


def test_who_has_the_reply_may_count_on_the_room(
    run: Run, channel: ChannelKind, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argument and result of a blocking handler, each as large as the arena, any number of times."""
    monkeypatch.setattr(async_server, "ThreadPoolExecutor", _Retentive)
    monkeypatch.setattr(_Retentive, "kept", [])

    async def main() -> None:
        async with served(address), AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
            for i in range(20):
                loan = client.empty((ARENA_BYTES,), torch.uint8).fill_(i)
                result = await client.call("double", loan)
                assert int(result[-1]) == 2 * i
                del loan, result
            assert await wholly_free(client)
        assert len(_Retentive.kept) >= 20

    run(main())


# Clients of all kinds


def test_blocking_and_asyncio_clients_on_both_channels_at_once(run: Run, channel: ChannelKind, address: str) -> None:
    """Each gets its own results, all contents checked; ``channel`` is that of the first to come."""
    left: list[int] = []

    def work(kind: ChannelKind, value: int) -> int:
        with Client(address, channel=kind, arena_bytes=ARENA_BYTES) as client:
            for i in range(50):
                x = torch.full((1 + i * 37 % 2000,), value + i)
                assert torch.equal(client.call("double", x), x * 2)
            return client.server_pid

    async def work_in_loop(kind: ChannelKind, value: int) -> int:
        async with AsyncClient(address, channel=kind, arena_bytes=8 * ARENA_BYTES) as client:
            for i in range(10):
                tensors = [torch.full((1 + (i + j) * 37 % 2000,), value + i + j) for j in range(5)]
                results = await asyncio.gather(*(client.call("double", x) for x in tensors))
                assert all(torch.equal(y, x * 2) for x, y in zip(tensors, results, strict=True))
            return client.server_pid

    async def main() -> None:
        async with served(address) as server:
            server.on_disconnect(left.append)
            kinds: list[ChannelKind] = [channel, "zmq", "doorbell"]
            threads = [asyncio.to_thread(work, kind, 1000 * i) for i, kind in enumerate(kinds)]
            loops = [work_in_loop(kind, 10_000 * i) for i, kind in enumerate(kinds)]
            assert len(set(await asyncio.gather(*threads, *loops))) == 1
            assert await becomes(lambda: sorted(left) == [1, 2, 3, 4, 5, 6])
            assert server.statistics().calls == 3 * 50 + 3 * 10 * 5
            assert server.statistics().failures == 0

    run(main())


def test_a_flood_of_calls_is_answered_in_full(run: Run, channel: ChannelKind, address: str) -> None:
    """Thousands at once from one client, while another's few are answered as well."""

    async def echo(value: int) -> int:
        return value

    async def main() -> None:
        async with (
            served(address, options={"max_calls_in_progress": 10_000}, coroutine=echo),
            AsyncClient(address, channel=channel) as greedy,
            AsyncClient(address, channel=channel) as modest,
        ):
            tasks = [asyncio.create_task(greedy.call("coroutine", i)) for i in range(3000)]
            for i in range(5):
                assert await modest.call("echo", i) == i
            assert await asyncio.gather(*tasks) == list(range(3000))

    run(main())


def test_a_server_of_each_kind_in_one_process(run: Run, channel: ChannelKind, address: str) -> None:
    """They share nothing: one in the loop calls the other in a thread, with a result that passes through both."""
    inner_address = f"{address}-inner"

    async def main() -> None:
        async with served(inner_address, Server), AsyncClient(inner_address, channel=channel) as inner:

            async def forward(x: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = await inner.call("double", x)
                return result

            async with served(address, forward=forward), AsyncClient(address, channel=channel) as client:
                tensors = [torch.full((100,), i) for i in range(20)]
                results = await asyncio.gather(*(client.call("forward", x) for x in tensors))
                assert all(torch.equal(y, x * 2) for x, y in zip(tensors, results, strict=True))

    run(main())
