"""A reply without room waits for it alone: what else is served meanwhile, and how the wait ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shmtransport import (
    ArenaFull,
    AsyncClient,
    CallCancelled,
    CallTimeout,
    Client,
    Server,
    TensorTooLarge,
    as_completed,
)
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import KIB, MIB
from tests.support.helpers import Serve, Spawn, echo, eventually, in_thread, start_server
from tests.support.left_behind import kill
from tests.support.loops import AnyServer, becomes, by_each_server, on_each_channel, served
from tests.support.process import ROOT

pytestmark = pytest.mark.timeout(120)

CLIENT = ROOT / "tests/support/processes/streaming_client.py"
ARENA_BYTES = 64 * KIB
MOST = 40 * KIB  # more than half of the arena, so that two have no room
A_WHILE_S = 0.05  # what has not happened by then is not about to


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest) -> int:
    """A server that handles calls in its own thread, and one that has several for them."""
    count: int = request.param
    return count


class Serving:
    """A server with ``fill``, whose result lies in the reply arena, ``make``, whose result must be copied, and echo."""

    def __init__(self, serve: Serve, threads: int) -> None:
        self.server: Server = serve(options={"threads": threads}, echo=echo, make=self.make)
        self.server.register("fill", self.fill)
        self.calls = 0

    def fill(self, nbytes: int, value: int = 1) -> torch.Tensor:
        self.calls += 1
        return self.server.empty((nbytes,), torch.uint8).fill_(value)

    @staticmethod
    def make(nbytes: int, value: int = 1) -> torch.Tensor:
        return torch.full((nbytes,), value, dtype=torch.uint8)


@pytest.fixture
def serving(serve: Serve, threads: int) -> Serving:
    return Serving(serve, threads)


def waits(server: Server, count: int = 1) -> bool:
    """Whether this number of replies have begun to wait for room."""
    return eventually(lambda: server.statistics().stalls == count)


# Who waits


@pytest.mark.parametrize("method", ["fill", "make"])
def test_a_reply_waits_until_its_client_releases(
    serving: Serving, address: str, channel: ChannelKind, method: str
) -> None:
    """Then it comes, with its own contents; its handler has run once."""
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = [client.call(method, MOST, 1)]
        waiting = client.submit(method, MOST, 2)
        assert waits(serving.server)
        time.sleep(A_WHILE_S)
        assert not waiting.done()
        assert bool((held.pop() == 1).all())
        assert bool((waiting.result() == 2).all())
        assert serving.server.statistics().failures == 0
        assert serving.server.statistics().stall_seconds >= A_WHILE_S
        assert serving.calls in (0, 2)


def test_only_that_reply_waits(serving: Serving, address: str, channel: ChannelKind) -> None:
    """Another client's calls are answered meanwhile, and the same client's, except that results take room in order."""
    with (
        Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        Client(address, channel=channel, arena_bytes=ARENA_BYTES) as other,
    ):
        held = client.call("fill", MOST, 1)
        waiting = client.submit("fill", MOST, 2)
        for value in range(50):
            assert client.call("echo", value) == value
            assert bool((other.call("fill", ARENA_BYTES, value) == value).all())
        behind = client.submit("fill", 10 * KIB, 3)
        assert client.call("echo", 1) == 1
        assert not waiting.done()
        assert not behind.done()
        assert bool((held == 1).all())
        del held
        assert bool((behind.result() == 3).all())
        assert bool((waiting.result() == 2).all())


def test_replies_that_wait_come_as_there_is_room(serving: Serving, address: str, channel: ChannelKind) -> None:
    """One result is released at a time; every reply comes, with its own contents, and none is lost."""
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = [client.call("fill", 20 * KIB, 0) for _ in range(3)]
        waiting = {value: client.submit("fill", 20 * KIB, value) for value in range(1, 4)}
        assert waits(serving.server, 3)
        while waiting:
            held.pop(0)
            assert eventually(lambda: any(one.done() for one in waiting.values()))
            for value in [value for value, one in waiting.items() if one.done()]:
                result = waiting.pop(value).result()
                assert bool((result == value).all())
                held.append(result)
                del result
        held.clear()
        assert bool((client.call("fill", ARENA_BYTES, 9) == 9).all())


def test_the_wait_keeps_no_core_busy(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """The server looks again after pauses."""
    server = start_server(spawn, address)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("fill", MOST // 4, 1.0)
        waiting = client.submit("fill", MOST // 4, 2.0)
        assert client.call("echo", 1) == 1
        before = _cpu_seconds(server.pid)
        time.sleep(0.4)
        assert _cpu_seconds(server.pid) - before < 0.28
        assert held[0] == 1.0
        del held
        assert waiting.result()[0] == 2.0


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100.0


# Ten large results at once


@pytest.mark.usefixtures("default_arenas")
@on_each_channel
@by_each_server
def test_ten_results_that_do_not_fit_together_all_come(
    channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """With default arenas of 64 MiB, and 9 MiB each; to clients that drop each when they have seen it."""
    nbytes = 9 * MIB

    def value_of(result: torch.Tensor) -> int:
        value = int(result[0])
        assert bool((result == value).all())
        return value

    def make(value: int) -> torch.Tensor:
        return torch.full((nbytes,), value, dtype=torch.uint8)

    async def main() -> None:
        async with served(address, kind, make=make) as server:
            server.register("lend", lambda value: server.empty((nbytes,), torch.uint8).fill_(value))

            def blocking(method: str) -> None:
                with Client(address, channel=channel) as client:
                    pending = [client.submit(method, value) for value in range(10)]
                    seen = [value_of(one.result()) for one in as_completed(pending)]
                    assert sorted(seen) == list(range(10))

            async def in_the_loop(method: str) -> None:
                async with AsyncClient(address, channel=channel) as client:

                    async def call(value: int) -> bool:
                        return bool((await client.call(method, value) == value).all())

                    assert await asyncio.gather(*(call(value) for value in range(10))) == [True] * 10

            for method in ("make", "lend"):
                await asyncio.to_thread(blocking, method)
                await in_the_loop(method)
            assert server.statistics().failures == 0

    asyncio.run(main())


@on_each_channel
def test_a_result_that_lies_in_the_arena_waits_for_no_older_one(channel: ChannelKind, address: str) -> None:
    """The older one waits for the room that it takes, so neither would ever be sent."""

    async def main() -> None:
        lent, may_end = asyncio.Event(), asyncio.Event()

        async def lend() -> torch.Tensor:
            result = server.empty((MOST,), torch.uint8).fill_(1)
            lent.set()
            await may_end.wait()
            return result

        async def make() -> torch.Tensor:
            await lent.wait()
            return torch.full((MOST,), 2, dtype=torch.uint8)

        async with (
            served(address, lend=lend, make=make) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            first, second = asyncio.create_task(client.call("lend")), asyncio.create_task(client.call("make"))
            assert await becomes(lambda: server.statistics().stalls == 1)
            may_end.set()
            assert bool((await first == 1).all())
            del first
            assert bool((await second == 2).all())

    asyncio.run(main())


# How the wait ends


@pytest.mark.parametrize("method", ["fill", "make"])
def test_its_clients_time_out_ends_the_wait(serving: Serving, address: str, channel: ChannelKind, method: str) -> None:
    """The error says how many received tensors are kept; what waited at the server is given up."""
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = [client.call("fill", 20 * KIB, value) for value in range(2)]
        brief = client.with_options(timeout_s=0.05)
        for _ in range(5):  # more than may wait at once
            with pytest.raises(CallTimeout, match=r"2 received tensors are kept here") as caught:
                brief.call(method, MOST, 9)
            assert caught.value.sent
        assert [bool((one == value).all()) for value, one in enumerate(held)] == [True] * 2
        held.clear()
        assert bool((client.call(method, ARENA_BYTES, 5) == 5).all())


def test_cancelling_it_ends_the_wait(serving: Serving, address: str, channel: ChannelKind) -> None:
    """What it kept at the server is free for the next that waits, and no late reply takes up room."""
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("fill", MOST, 1)
        for number in range(1, 6):
            waiting = client.submit("fill", MOST, 2)
            assert waits(serving.server, number)
            assert waiting.cancel()
            with pytest.raises(CallCancelled):
                waiting.result()
        last = client.submit("fill", ARENA_BYTES, 3)
        assert waits(serving.server, 6)
        assert bool((held == 1).all())
        del held
        assert bool((last.result() == 3).all())
        assert serving.server.statistics().failures == 0


@pytest.mark.parametrize("how", ["close", "kill"])
def test_its_clients_end_ends_the_wait(
    spawn: Spawn, serving: Serving, address: str, channel: ChannelKind, how: str
) -> None:
    """The server is idle afterwards, and stops at once."""
    if how == "kill":
        client = spawn(CLIENT, address, channel, "hold")
        assert waits(serving.server)
        kill(client)
    else:
        with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as other:
            held = other.call("fill", MOST, 1)
            waiting = other.submit("fill", MOST, 2)
            assert waits(serving.server)
        assert waiting.done()
        assert bool((held == 1).all())
    assert eventually(lambda: not serving.server._connections)
    assert eventually(lambda: not serving.server._deferred)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as other:
        assert bool((other.call("fill", ARENA_BYTES, 3) == 3).all())


@by_each_server
@on_each_channel
def test_stopping_the_server_ends_the_wait(channel: ChannelKind, address: str, kind: type[AnyServer]) -> None:
    """At the latest when its time to drain is over; before that the reply may still come."""

    async def main() -> None:
        client = AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES)
        async with served(address, kind, {"drain_timeout_s": 0.1}):
            await client.connect()
            held = await client.call("fill", MOST, 1)
            waiting = asyncio.create_task(client.call("fill", MOST, 2))
            await client.call("echo", 1)
            await asyncio.sleep(A_WHILE_S)
            assert not waiting.done()
        with pytest.raises(Exception, match="the server"):
            await waiting
        assert bool((held == 1).all())
        await client.close()

    asyncio.run(main())


def test_room_that_comes_while_the_server_drains_is_used(serving: Serving, address: str, channel: ChannelKind) -> None:
    """The reply to a call that had arrived is still sent after ``stop``."""
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("fill", MOST, 1)
        waiting = client.submit("fill", MOST, 2)
        assert waits(serving.server)
        serving.server.stop()
        time.sleep(A_WHILE_S)
        assert bool((held == 1).all())
        del held
        assert bool((waiting.result() == 2).all())


# What never waits


def test_no_more_waits_than_the_arena_holds(serving: Serving, address: str, channel: ChannelKind) -> None:
    """Then no more calls of this client are handled, until there is room; other clients' are."""
    with (
        Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        Client(address, channel=channel) as other,
    ):
        held = client.call("fill", MOST, 1)
        waiting = [client.submit("fill", 30 * KIB, value) for value in range(3)]
        assert waits(serving.server, 3)
        not_handled = client.submit("echo", 4)
        assert other.call("echo", 1) == 1
        assert not not_handled.done()
        assert bool((held == 1).all())
        del held
        assert [bool((one.result() == value).all()) for value, one in enumerate(waiting)] == [True, True, True]
        assert not_handled.result() == 4
        assert serving.server.statistics().failures == 0


def test_what_can_never_fit_fails_at_once(serving: Serving, address: str, channel: ChannelKind) -> None:
    """A result that is larger than the arena does not wait, whatever the client holds."""
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("fill", MOST, 1)
        for method in ("fill", "make"):
            with pytest.raises(TensorTooLarge):
                client.call(method, ARENA_BYTES + 1)
        assert bool((held == 1).all())
        assert serving.server.statistics().stalls == 0


def test_room_that_only_the_handler_can_make_is_not_waited_for(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """A handler that keeps loans fills its caller's arena itself: ArenaFull, at once."""
    server = serve(options={"threads": threads}, echo=echo)
    kept: list[torch.Tensor] = []

    def keep() -> None:
        kept.append(server.empty((MOST,), torch.uint8))

    server.register("keep", keep)
    server.register("make", lambda: torch.ones(MOST, dtype=torch.uint8))
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        client.call("keep")
        for method in ("keep", "make"):
            with pytest.raises(ArenaFull, match="none of them by the peer"):
                client.call(method)
        kept.clear()
        assert bool((client.call("make") == 1).all())


# Memory of the server's own


def test_empty_gives_other_memory_while_the_client_holds_results(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """In place of an error; it is copied in when there is room, and counts as copied."""
    server = serve(options={"threads": threads})
    seen: list[tuple[torch.Size, torch.dtype]] = []

    def make(value: int) -> dict[str, Any]:
        tensor = server.empty((4, 10 * KIB), torch.uint8).fill_(value)
        like = server.empty_like(tensor[0])
        seen.append((tensor.shape, tensor.dtype))
        assert like.shape == (10 * KIB,)
        return {"tensor": tensor, "value": value}

    server.register("make", make)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("make", 1)
        assert server.statistics().tensors_copied == 0
        waiting = client.submit("make", 2)
        assert waits(server)
        assert bool((held["tensor"] == 1).all())
        del held
        result = waiting.result()
        assert result["value"] == 2
        assert bool((result["tensor"] == 2).all())
    assert seen == [(torch.Size((4, 10 * KIB)), torch.uint8)] * 2
    assert server.statistics().tensors_copied == 1


def test_several_tensors_of_one_reply_wait_together(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """While one of them has no room, the others hold none: a second try needs no more than the first."""
    server = serve(options={"threads": threads}, echo=echo)
    server.register("three", lambda: [torch.full((20 * KIB,), value, dtype=torch.uint8) for value in range(3)])
    server.register("fill", lambda nbytes: server.empty((nbytes,), torch.uint8).fill_(7))
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("fill", 10 * KIB)
        waiting = client.submit("three")
        assert waits(server)
        time.sleep(A_WHILE_S)
        given_up = client.submit("three")
        assert waits(server, 2)
        given_up.cancel()
        assert bool((held == 7).all())
        del held
        assert [bool((one == value).all()) for value, one in enumerate(waiting.result())] == [True] * 3


def test_a_part_of_a_stream_waits_as_a_reply_does(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """The parts behind it wait too, in order; other streams and calls don't."""
    server = serve(options={"threads": threads}, echo=echo)

    def parts(count: int) -> Iterator[torch.Tensor]:
        for value in range(count):
            yield server.empty((30 * KIB,), torch.uint8).fill_(value)

    server.register("parts", parts)
    server.register("fill", lambda nbytes: server.empty((nbytes,), torch.uint8).fill_(7))
    server.register("count", lambda: iter(range(20)))
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("fill", MOST)
        stream = client.stream("parts", 5)
        assert waits(server)
        assert list(client.stream("count")) == list(range(20))
        assert client.call("echo", 1) == 1
        stream._timeout_s, patience_s = 0.1, stream._timeout_s
        with pytest.raises(CallTimeout, match="1 received tensors are kept"):
            next(stream)
        stream._timeout_s = patience_s
        assert bool((held == 7).all())
        del held
        for value in range(5):
            part = next(stream)
            assert bool((part == value).all())
            del part
        assert next(stream, None) is None


def test_results_may_be_kept_by_one_thread_while_another_calls(
    serving: Serving, address: str, channel: ChannelKind
) -> None:
    """Threads of one client that each keep a result for a while: all calls succeed, and none waits for ever."""
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES, timeout_s=50.0) as client:

        def work(value: int) -> bool:
            right = True
            for turn in range(20):
                result = client.call("fill", 24 * KIB, value + turn)
                time.sleep(0.001)
                right = right and bool((result == value + turn).all())
                del result
            return right

        working = [in_thread(work, 10 * number) for number in range(4)]
        assert all(one.result(100.0) for one in working)
        assert bool((client.call("fill", ARENA_BYTES, 1) == 1).all())


@by_each_server
@on_each_channel
def test_the_asyncio_client_is_told_what_it_keeps(channel: ChannelKind, address: str, kind: type[AnyServer]) -> None:
    """Its CallTimeout names that too; a cancelled task and a time-out leave nothing waiting at the server."""

    async def main() -> None:
        async with (
            served(address, kind) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            held = await client.call("fill", MOST, 1)
            for number in range(1, 4):
                with pytest.raises(CallTimeout, match="1 received tensors are kept here"):
                    await client.with_options(timeout_s=0.05).call("fill", MOST, 2)
                task = asyncio.create_task(client.call("fill", MOST, 2))
                stalls = 2 * number
                assert await becomes(lambda: server.statistics().stalls == stalls)  # noqa: B023 - it is awaited here
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            waiting = asyncio.create_task(client.call("fill", ARENA_BYTES, 3))
            assert await becomes(lambda: server.statistics().stalls == 7)
            assert bool((held == 1).all())
            del held
            assert bool((await waiting == 3).all())
            assert server.statistics().failures == 0

    asyncio.run(main())
