"""Streaming calls of the asyncio client, and generators at the asyncio server; on both channels and loops."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch

from shmtransport import (
    ArenaFull,
    AsyncClient,
    AsyncServer,
    CallTimeout,
    ChannelKind,
    Client,
    Closed,
    LocalProtocolError,
    PeerDied,
    RemoteError,
)
from shmtransport.endpoints.async_reply_stream import AsyncReplyStream
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

READ_AHEAD = 8  # unless a call says otherwise
A_WHILE_S = 0.05  # what has not happened by then is not about to


class Endless:
    """Generators without an end, a plain and an asynchronous one; how many parts they have made, begun and ended."""

    def __init__(self) -> None:
        self.made = self.begun = self.ended = 0

    def plain(self) -> Iterator[int]:
        self.begun += 1
        try:
            while True:
                self.made += 1
                yield self.made
        finally:
            self.ended += 1

    async def in_the_loop(self) -> AsyncIterator[int]:
        self.begun += 1
        try:
            while True:
                self.made += 1
                yield self.made
        finally:
            await asyncio.sleep(0)
            self.ended += 1

    def named(self, kind: str) -> Callable[[], Any]:
        return self.plain if kind == "plain" else self.in_the_loop

    def is_over(self) -> bool:
        """Whether a call has begun, and none is in progress."""
        return self.begun == self.ended > 0


of_each_kind = pytest.mark.parametrize("kind", ["plain", "async"])


def count(parts: int) -> Iterator[int]:
    yield from range(parts)


async def count_in_the_loop(parts: int) -> AsyncIterator[int]:
    for number in range(parts):
        await asyncio.sleep(0)
        yield number


def counting(kind: str) -> Callable[[int], Any]:
    return count if kind == "plain" else count_in_the_loop


async def taken(stream: AsyncIterator[Any]) -> list[Any]:
    """All parts that are left of a stream."""
    return [part async for part in stream]


async def becomes_free(client: AsyncClient) -> bool:
    """Whether both arenas are free again, once a generator that is at work has noticed its end."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        with contextlib.suppress(ArenaFull):
            return await wholly_free(client)
        await asyncio.sleep(0.005)
    return False


# Parts


@of_each_kind
@pytest.mark.parametrize("parts", [0, 1, READ_AHEAD + 1, 300])
def test_all_parts_come_in_order_and_then_the_end(
    run: Run, channel: ChannelKind, address: str, kind: str, parts: int
) -> None:
    """Of a plain generator and of an asynchronous one; the stream then stays at its end."""

    async def main() -> None:
        async with (
            served(address, count=counting(kind)),
            AsyncClient(address, channel=channel) as client,
        ):
            stream = client.stream("count", parts)
            assert await taken(stream) == list(range(parts))
            assert await taken(stream) == []
            assert await taken(client.stream("count", parts=2)) == [0, 1]
            assert await client.call("echo", 1) == 1

    run(main())


@by_each_server
def test_both_kinds_of_client_get_the_same_parts(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """From either kind of server, also at the same time."""

    async def main() -> None:
        async with served(address, kind, count=count), AsyncClient(address, channel=channel) as client:

            def blocking() -> list[int]:
                with Client(address, channel=channel) as other:
                    return list(other.stream("count", 200))

            one, other = await asyncio.gather(asyncio.to_thread(blocking), taken(client.stream("count", 200)))
            assert one == other == list(range(200))

    run(main())


def test_a_coroutine_may_return_the_parts(run: Run, channel: ChannelKind, address: str) -> None:
    """A handler that awaits something before it has an iterator, and an iterator that is no generator."""

    class Twice:
        def __init__(self) -> None:
            self.left = 2

        def __aiter__(self) -> Twice:
            return self

        async def __anext__(self) -> int:
            if self.left == 0:
                raise StopAsyncIteration
            self.left -= 1
            return self.left

    async def later(parts: int) -> Any:
        await asyncio.sleep(0)
        return count_in_the_loop(parts)

    async def twice() -> Twice:
        return Twice()

    async def main() -> None:
        async with (
            served(address, later=later, twice=twice),
            AsyncClient(address, channel=channel) as client,
        ):
            assert await taken(client.stream("later", 20)) == list(range(20))
            assert await taken(client.stream("twice")) == [1, 0]
            async with client.stream("twice") as stream:
                assert await anext(stream) == 1
            assert await client.call("echo", 1) == 1

    run(main())


@of_each_kind
def test_each_part_runs_as_the_callers_call(run: Run, channel: ChannelKind, address: str, kind: str) -> None:
    """``connection_id`` and ``empty`` belong to the stream's client in every part of it."""

    async def main() -> None:
        async with (
            served(address) as server,
            AsyncClient(address, channel=channel) as one,
            AsyncClient(address, channel=channel) as other,
        ):

            def part(value: int) -> list[Any]:
                return [server.connection_id, server.empty((1,), torch.int64).fill_(value)]

            def plain() -> Iterator[list[Any]]:
                for value in range(15):
                    yield part(value)

            async def in_the_loop() -> AsyncIterator[list[Any]]:
                for value in range(15):
                    await asyncio.sleep(0)
                    yield part(value)

            server.register("who", plain if kind == "plain" else in_the_loop)
            mine, its = one.stream("who"), other.stream("who")
            for value in range(15):
                for number, stream in ((1, mine), (2, its)):
                    caller, tensor = await anext(stream)
                    assert (caller, tensor.item()) == (number, value)
            assert server.statistics().tensors_copied == 0

    run(main())


# Read-ahead


@of_each_kind
@pytest.mark.parametrize("read_ahead", [None, 1, 3, 1024])
def test_the_server_is_no_further_ahead_than_allowed(
    run: Run, channel: ChannelKind, address: str, kind: str, read_ahead: int | None
) -> None:
    """Nothing is made before the first part is asked for; then as many as allowed, and never more."""
    endless = Endless()

    async def main() -> None:
        async with (
            served(address, endless=endless.named(kind)),
            AsyncClient(address, channel=channel) as client,
        ):
            caller = client if read_ahead is None else client.with_options(read_ahead=read_ahead)
            ahead = READ_AHEAD if read_ahead is None else read_ahead
            stream = caller.stream("endless")
            await client.call("echo", 1)
            assert endless.begun == 0
            assert await anext(stream) == 1
            assert await becomes(lambda: endless.made >= ahead)
            await asyncio.sleep(A_WHILE_S)
            assert ahead <= endless.made <= ahead + 1
            for number in range(2, 2 * ahead + 5):
                assert await anext(stream) == number
                assert endless.made <= number + ahead
            await stream.aclose()
            assert await becomes(endless.is_over)

    run(main())


def test_a_read_ahead_beyond_its_limits_is_refused(run: Run, channel: ChannelKind, address: str) -> None:
    """It is 1 to 1024; the error names the option."""

    async def main() -> None:
        client = AsyncClient(address, channel=channel)
        for wrong in (0, -1, 1025, 1.5, "8"):
            with pytest.raises(LocalProtocolError, match="read_ahead"):
                client.with_options(read_ahead=wrong)  # type: ignore[arg-type]

    run(main())


# Early ends


async def give_up(stream: AsyncReplyStream, how: str) -> None:
    """End a stream early; the caller has no other reference to it."""
    if how == "aclose":
        await stream.aclose()
        await stream.aclose()
        assert await taken(stream) == []
    elif how == "leave":
        async with stream:
            pass
        assert await taken(stream) == []
    elif how == "cancel":
        task = asyncio.create_task(taken(stream))
        await asyncio.sleep(A_WHILE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@by_each_server
@pytest.mark.parametrize("how", ["aclose", "leave", "drop", "cancel"])
def test_a_stream_that_is_given_up_ends_its_generator(
    run: Run, channel: ChannelKind, address: str, how: str, kind: type[AnyServer]
) -> None:
    """However it is given up: the generator's ``finally`` runs, and the connection is as before."""
    endless = Endless()

    async def main() -> None:
        handlers: dict[str, Any] = {"plain": endless.plain}
        if kind is AsyncServer:
            handlers["in the loop"] = endless.in_the_loop
        async with (
            served(address, kind, **handlers) as server,
            AsyncClient(address, channel=channel) as client,
        ):
            for turn, name in enumerate(handlers, 1):
                stream = client.stream(name)
                assert await anext(stream) > 0
                await give_up(stream, how)
                del stream
                assert await becomes(lambda: endless.begun == endless.ended == turn)  # noqa: B023 - it is awaited here
                made = endless.made
                assert await client.call("echo", 1) == 1
                assert endless.made == made
            assert server.statistics().failures == 0

    run(main())


def test_a_stream_is_closed_while_the_generator_is_at_work(run: Run, channel: ChannelKind, address: str) -> None:
    """An asynchronous one is cancelled where it awaits; a plain one ends after the step that it is in."""
    gate = Gate()
    ended: list[str] = []

    def plain() -> Iterator[int]:
        try:
            yield 1
            gate.wait()
            yield 2
        finally:
            ended.append("plain")

    async def in_the_loop() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
            yield 2
        finally:
            ended.append("in_the_loop")

    async def main() -> None:
        async with (
            served(address, plain=plain, in_the_loop=in_the_loop) as server,
            AsyncClient(address, channel=channel) as client,
        ):
            for name in ("in_the_loop", "plain"):
                stream = client.stream(name)
                assert await anext(stream) == 1
                assert name != "plain" or await becomes(lambda: gate.entered == 1)
                await stream.aclose()
                assert await client.call("echo", 1) == 1
                if name == "plain":
                    assert ended == ["in_the_loop"]
                    gate.open()
                assert await becomes(lambda: name in ended)  # noqa: B023 - it is awaited here
            assert server.statistics().failures == 0

    run(main())


def test_a_stream_that_is_never_iterated_makes_no_call(run: Run, channel: ChannelKind, address: str) -> None:
    """Neither does one that is closed before that."""
    endless = Endless()

    async def main() -> None:
        async with (
            served(address, endless=endless.plain) as server,
            AsyncClient(address, channel=channel) as client,
        ):
            dropped = client.stream("endless")
            del dropped
            closed = client.stream("endless")
            await closed.aclose()
            assert await taken(closed) == []
            assert await client.call("echo", 1) == 1
            assert server.statistics().calls <= 1
        assert endless.begun == 0

    run(main())


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_an_abandoned_loop_over_a_stream_ends_it(
    run: Run, channel: ChannelKind, address: str, error: type[BaseException]
) -> None:
    """Left by an error inside the ``async with`` block."""
    endless = Endless()

    async def main() -> None:
        async with (
            served(address, endless=endless.in_the_loop),
            AsyncClient(address, channel=channel) as client,
        ):

            async def work() -> None:
                async with client.stream("endless") as stream:
                    async for part in stream:
                        if part == 20:
                            raise error

            with pytest.raises(error):
                await work()
            assert await becomes(endless.is_over)

    run(main())


# Errors


@of_each_kind
def test_an_error_comes_after_the_parts_before_it(run: Run, channel: ChannelKind, address: str, kind: str) -> None:
    """It is raised once, and then the stream is over."""

    def plain(parts: int) -> Iterator[int]:
        yield from range(parts)
        raise DeliberateError("after the last part")

    async def in_the_loop(parts: int) -> AsyncIterator[int]:
        for number in range(parts):
            yield number
        raise DeliberateError("after the last part")

    async def main() -> None:
        handler: Any = plain if kind == "plain" else in_the_loop
        async with (
            served(address, fail_after=handler) as server,
            AsyncClient(address, channel=channel) as client,
        ):
            for parts in (0, 3, 50):
                stream = client.stream("fail_after", parts)
                assert [await anext(stream) for _ in range(parts)] == list(range(parts))
                with pytest.raises(RemoteError, match="DeliberateError: after the last part"):
                    await anext(stream)
                assert await taken(stream) == []
            assert server.statistics().failures == 3

    run(main())


@of_each_kind
def test_a_part_that_can_not_be_sent_ends_the_stream(run: Run, channel: ChannelKind, address: str, kind: str) -> None:
    """The parts before it come first, then its error; the generator's ``finally`` runs."""
    ended: list[int] = []

    def plain() -> Iterator[object]:
        try:
            yield from (1, object(), 3)
        finally:
            ended.append(1)

    async def in_the_loop() -> AsyncIterator[object]:
        try:
            for part in (1, object(), 3):
                yield part
        finally:
            ended.append(1)

    async def main() -> None:
        handler: Any = plain if kind == "plain" else in_the_loop
        async with served(address, parts=handler), AsyncClient(address, channel=channel) as client:
            stream = client.stream("parts")
            assert await anext(stream) == 1
            with pytest.raises(LocalProtocolError, match="object"):
                await anext(stream)
            assert await taken(stream) == []
            assert await becomes(lambda: ended == [1])
            assert await client.call("echo", 1) == 1

    run(main())


@of_each_kind
def test_the_wrong_kind_of_call_is_the_callers_error(run: Run, channel: ChannelKind, address: str, kind: str) -> None:
    """``call`` of a generator, ``stream`` of anything else, and a stream of what is not there."""

    async def main() -> None:
        async with (
            served(address, count=counting(kind)),
            AsyncClient(address, channel=channel) as client,
        ):
            with pytest.raises(LocalProtocolError, match="generator"):
                await client.call("count", 3)
            with pytest.raises(LocalProtocolError, match=r"'echo' returned a list.*use call\(\)"):
                await anext(client.stream("echo", [1, 2]))
            with pytest.raises(LocalProtocolError, match="no such"):
                await anext(client.stream("no such"))
            assert await taken(client.stream("count", 3)) == [0, 1, 2]

    run(main())


@of_each_kind
def test_a_part_that_does_not_come_in_time_leaves_the_stream_open(
    run: Run, channel: ChannelKind, address: str, kind: str
) -> None:
    """Once it comes, it is the next."""
    gate = Gate()

    def plain() -> Iterator[int]:
        yield 1
        gate.wait()
        yield 2
        yield 3

    async def in_the_loop() -> AsyncIterator[int]:
        yield 1
        await gate.passed()
        yield 2
        yield 3

    async def main() -> None:
        handler: Any = plain if kind == "plain" else in_the_loop
        async with served(address, slow=handler), AsyncClient(address, channel=channel) as client:
            stream = client.stream("slow")
            assert await anext(stream) == 1
            stream._timeout_s, patience_s = 0.1, stream._timeout_s
            for _ in range(2):
                with pytest.raises(CallTimeout, match=r"'slow' within 0\.1 s"):
                    await anext(stream)
            stream._timeout_s = patience_s
            gate.open()
            assert await becomes(lambda: gate.left == 1)
            await asyncio.sleep(A_WHILE_S)
            assert await taken(stream) == [2, 3]

    run(main())


# The end of a client or of a server


@by_each_server
@pytest.mark.parametrize("how", ["close", "reconnect"])
def test_a_client_that_ends_ends_its_generators(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer], how: str
) -> None:
    """Its streams raise Closed, once; no message about them goes over the new connection."""
    endless = Endless()

    async def main() -> None:
        async with served(address, kind, endless=endless.plain, count=count):
            client = await AsyncClient(address, channel=channel).connect()
            streams = [client.stream("endless") for _ in range(3)]
            assert [await anext(stream) > 0 for stream in streams] == [True] * 3
            await (client.close() if how == "close" else client.reconnect())
            assert await becomes(endless.is_over)
            if how == "reconnect":
                new = client.stream("count", 50)
                assert await anext(new) == 0
            for stream in streams:
                with pytest.raises(Closed):
                    await taken(stream)
                assert await taken(stream) == []
            if how == "reconnect":
                assert await taken(new) == list(range(1, 50))
            await client.close()

    run(main())


@by_each_server
def test_a_server_that_stops_ends_its_streams(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """The parts that it sent come first, then PeerDied; the generators' ``finally`` have run."""
    endless = Endless()

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with served(address, kind, {"drain_timeout_s": 0.1}, endless=endless.plain):
                client = await stack.enter_async_context(AsyncClient(address, channel=channel))
                stream = client.stream("endless")
                assert await anext(stream) == 1
            rest: list[int] = []

            async def take() -> None:
                async for part in stream:
                    rest.append(part)  # noqa: PERF401 - those before the error count

            with pytest.raises(PeerDied):
                await take()
            assert rest == list(range(2, len(rest) + 2))
            assert await becomes(endless.is_over)

    run(main())


# Tensors


@by_each_server
def test_parts_with_tensors_pass_through_a_small_arena(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """Many times as much as it holds, also where the client keeps some; all is released in the end."""

    async def main() -> None:
        async with (
            served(address, kind) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):

            def tensors(parts: int, size: int) -> Iterator[torch.Tensor]:
                for value in range(parts):
                    yield server.empty((size,), torch.uint8).fill_(value)

            server.register("tensors", tensors)
            held: list[torch.Tensor] = []
            value = 0
            async for part in client.stream("tensors", 100, 10_000):
                held.append(part)
                del part
                held[:-4] = []
                assert [bool((one == value - len(held) + 1 + i).all()) for i, one in enumerate(held)] == [True] * len(
                    held
                )
                value += 1
            assert value == 100
            held.clear()
            assert await wholly_free(client)

    run(main())


@by_each_server
def test_parts_that_are_not_taken_are_released(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """By a close and by a drop: those that had arrived, and those on their way."""

    async def main() -> None:
        async with (
            served(address, kind) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):

            def tensors() -> Iterator[torch.Tensor]:
                while True:
                    yield server.empty((2000,), torch.uint8).fill_(1)

            server.register("tensors", tensors)
            for how in ("aclose", "drop", "leave", "cancel") * 3:
                stream = client.stream("tensors")
                assert (await anext(stream))[0] == 1
                await give_up(stream, how)
                del stream
                assert await becomes_free(client)

    run(main())


# Several at once


@by_each_server
def test_streams_and_calls_are_interleaved_on_one_connection(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """Each task has its own stream's parts in order, while others make calls."""

    async def main() -> None:
        async with served(address, kind, count=count), AsyncClient(address, channel=channel) as client:

            async def stream(parts: int) -> None:
                number = 0
                async for part in client.with_options(read_ahead=1 + parts % 5).stream("count", parts):
                    assert part == number
                    number += 1
                    await asyncio.sleep(0)
                assert number == parts

            async def call(value: int) -> None:
                assert await client.call("echo", value) == value
                assert (await client.call("double", torch.full((3,), float(value)))).tolist() == [2.0 * value] * 3

            await asyncio.gather(*(stream(parts) for parts in range(0, 200, 17)), *(call(i) for i in range(100)))

    run(main())


@of_each_kind
def test_streams_count_among_the_calls_in_progress(run: Run, channel: ChannelKind, address: str, kind: str) -> None:
    """A stream beyond ``max_calls_in_progress`` fails, and one that has ended counts no longer."""
    endless = Endless()

    async def main() -> None:
        async with (
            served(address, options={"max_calls_in_progress": 3}, endless=endless.named(kind)) as server,
            AsyncClient(address, channel=channel) as client,
        ):
            streams = [client.stream("endless") for _ in range(3)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(LocalProtocolError, match="max_calls_in_progress is 3"):
                await anext(client.stream("endless"))
            await streams.pop().aclose()
            assert await becomes(lambda: endless.ended == 1)
            (connection,) = server._connections.values()
            assert await becomes(lambda: connection.in_progress == 2)  # a moment after its generator has ended
            assert await client.call("echo", 1) == 1
            for stream in streams:
                await stream.aclose()

    run(main())


@of_each_kind
def test_streams_that_nobody_reads_hold_up_no_one(run: Run, channel: ChannelKind, address: str, kind: str) -> None:
    """Not even where the server has one thread for plain generators."""
    endless = Endless()

    async def main() -> None:
        async with (
            served(address, options={"threads": 1}, endless=endless.named(kind), count=count),
            AsyncClient(address, channel=channel) as client,
            AsyncClient(address, channel=channel) as other,
        ):
            streams = [client.stream("endless") for _ in range(10)]
            for stream in streams:
                assert await anext(stream) > 0
            for one in (client, other):
                assert await taken(one.stream("count", 50)) == list(range(50))
            for stream in streams:
                await stream.aclose()
            assert await becomes(endless.is_over)

    run(main())


def test_a_stream_shows_what_it_is(run: Run, channel: ChannelKind, address: str) -> None:
    """Its method, and whether it is open."""

    async def main() -> None:
        async with served(address, count=count), AsyncClient(address, channel=channel) as client:
            stream = client.stream("count", 1)
            assert stream.method == "count"
            assert repr(stream) == "<AsyncReplyStream 'count': open>"
            assert await taken(stream) == [0]
            assert repr(stream) == "<AsyncReplyStream 'count': ended>"

    run(main())


def test_a_generator_that_is_at_work_when_the_server_is_closed(run: Run, channel: ChannelKind, address: str) -> None:
    """A plain one in its thread: it ends after the step that it is in, and its ``finally`` runs."""
    gate = Gate()
    ended: list[int] = []

    def plain() -> Iterator[int]:
        try:
            yield 1
            gate.wait()
            yield 2
        finally:
            ended.append(1)

    async def main() -> None:
        async with served(address, options={"drain_timeout_s": 0.1}, plain=plain):
            client = await AsyncClient(address, channel=channel).connect()
            stream = client.stream("plain")
            assert await anext(stream) == 1
            assert await becomes(lambda: gate.entered == 1)
        with pytest.raises(PeerDied):
            await taken(stream)
        await client.close()
        gate.open()
        assert await becomes(lambda: ended == [1])

    run(main())
