"""One-way calls: ``send`` of both clients, in order with other calls and without an answer."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from typing import Any

import pytest
import torch

from shmtransport import (
    ArenaFull,
    AsyncClient,
    CallTimeout,
    Client,
    Closed,
    LocalProtocolError,
    MessageTooLarge,
    PeerDied,
    TensorTooLarge,
)
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import KIB
from tests.support.helpers import DeliberateError, Serve, Spawn, echo, eventually, start_server
from tests.support.left_behind import kill
from tests.support.loops import (
    ARENA_BYTES,
    AnyServer,
    Gate,
    becomes,
    by_each_server,
    on_each_channel,
    served,
    wholly_free,
)

pytestmark = pytest.mark.timeout(60)


def fail(text: str = "on purpose") -> None:
    raise DeliberateError(text)


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest) -> int:
    """A server that handles calls in its own thread, and one that has several for them."""
    count: int = request.param
    return count


# The blocking client


def test_it_is_handled_in_order_with_other_calls(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Whatever was sent before a call has been handled when that is answered."""
    seen: list[int] = []
    serve(options={"threads": threads}, add=seen.append, seen=lambda: seen)
    with Client(address, channel=channel) as client:
        for turn in range(0, 100, 5):
            for number in range(turn, turn + 4):
                assert client.send("add", number) is None  # type: ignore[func-returns-value]
            client.call("add", turn + 4)
            assert seen == list(range(turn + 5))
        for number in range(100, 200):
            client.send("add", number)
        assert client.call("seen") == list(range(200))


def test_it_does_not_wait_for_its_handler(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """Nor is it in flight afterwards; its result goes nowhere, whatever it is."""
    may_go_on = threading.Event()

    def block() -> object:
        may_go_on.wait(30.0)
        return object()

    server = serve(options={"threads": threads}, block=block, echo=echo)
    with Client(address, channel=channel) as client:
        client.send("block")
        client.send("echo", "x" * 10_000)
        assert "0 calls in flight" in repr(client)
        may_go_on.set()
        assert client.call("echo", 1) == 1
        assert client.statistics().calls == 1
        assert server.statistics().calls == 3
        assert server.statistics().failures == 0


def test_what_it_raises_is_counted_and_logged(
    serve: Serve, address: str, channel: ChannelKind, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Also that there is no such method, or that the arguments don't fit it; the next calls are answered."""
    server = serve(options={"threads": threads}, fail=fail, echo=echo)
    with Client(address, channel=channel) as client:
        client.send("fail", "with this text")
        client.send("no such method")
        client.send("echo", 1, 2, 3)
        assert client.call("echo", 1) == 1
        assert client.statistics().failures == 0
    assert eventually(lambda: server.statistics().failures == 3)
    assert server.statistics().calls == 4
    for text in ("DeliberateError: with this text", "no such method", "TypeError"):
        assert text in caplog.text


def test_its_tensors_are_released(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """After its handler has returned, or raised; many times as many as fit may be sent in a row."""
    total = 0

    def add(x: torch.Tensor) -> None:
        nonlocal total
        total += int(x.sum())
        if total % 3 == 0:
            raise DeliberateError

    serve(options={"threads": threads}, add=add, size=lambda x: x.numel())
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        for value in range(50):
            client.send("add", torch.full((20 * KIB,), value % 3, dtype=torch.uint8))
            loan = client.empty((10 * KIB,), torch.uint8).fill_(1)
            client.send("add", loan)
            del loan
        assert client.call("size", torch.zeros(ARENA_BYTES, dtype=torch.uint8)) == ARENA_BYTES
        gc.collect()
    assert total == sum(value % 3 for value in range(50)) * 20 * KIB + 50 * 10 * KIB


def test_its_result_holds_no_room(serve: Serve, address: str, channel: ChannelKind, threads: int) -> None:
    """A handler's result with tensors is dropped at the server."""
    server = serve(options={"threads": threads})
    server.register("fill", lambda: server.empty((ARENA_BYTES,), torch.uint8).fill_(3))
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        for _ in range(20):
            client.send("fill")
        assert bool((client.call("fill") == 3).all())
    assert server.statistics().failures == 0


def test_what_can_not_be_sent_raises_here(serve: Serve, address: str, channel: ChannelKind) -> None:
    """As for any call, and nothing stays held for it."""
    seen: list[object] = []
    serve(add=seen.append, size=lambda x: x.numel())
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        whole = torch.zeros(ARENA_BYTES, dtype=torch.uint8)
        with pytest.raises(TensorTooLarge):
            client.send("add", torch.zeros(ARENA_BYTES + 1, dtype=torch.uint8))
        with pytest.raises(MessageTooLarge):
            client.send("add", [whole, "x" * 100_000])
        with pytest.raises(LocalProtocolError):
            client.send("add", [whole, object()])
        held = client.empty((ARENA_BYTES,), torch.uint8)
        with pytest.raises(ArenaFull):
            client.send("add", whole)
        del held
        assert client.call("size", whole) == ARENA_BYTES
    assert seen == []
    with pytest.raises(Closed):
        client.send("add", 1)


def test_other_options_count_for_it_too(serve: Serve, address: str, channel: ChannelKind) -> None:
    """``with_options(timeout_s=…).send`` waits that long for room, and no longer."""
    may_go_on = threading.Event()
    serve(hold=lambda x: may_go_on.wait(30.0), echo=echo)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        whole = torch.zeros(ARENA_BYTES, dtype=torch.uint8)
        brief = client.with_options(timeout_s=0.1)
        brief.send("hold", whole)
        with pytest.raises(ArenaFull, match="borrows by the peer"):
            brief.send("hold", whole)
        may_go_on.set()
        client.send("hold", whole)
        assert client.call("echo", 1) == 1


def test_what_was_sent_before_the_end_is_still_handled(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """A client that is closed right after it: its goodbye comes after what it has sent."""
    seen: list[int] = []
    serve(options={"threads": threads}, add=seen.append)
    for turn in range(5):
        with Client(address, channel=channel) as client:
            for number in range(20):
                client.send("add", 20 * turn + number)
        assert eventually(lambda: len(seen) == 20 * turn + 20)  # noqa: B023 - it is waited for here
    assert seen == list(range(100))


def test_it_raises_once_the_server_is_known_to_be_dead(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """As every call; one that was sent to a dying server is lost without an error."""
    server = start_server(spawn, address)
    with Client(address, channel=channel, timeout_s=10.0) as client:
        client.send("echo", 1)
        kill(server)
        with pytest.raises(PeerDied):
            client.call("echo", 1)
        with pytest.raises(PeerDied):
            client.send("echo", 1)


def test_a_stopped_server_is_not_waited_for_without_end(spawn: Spawn, address: str) -> None:
    """A full queue is CallTimeout, as for any call."""
    server = start_server(spawn, address)
    with Client(address, channel="doorbell", timeout_s=0.2, max_message_bytes=1024) as client:
        server.stop()
        with pytest.raises(CallTimeout, match="not sent"):
            [client.send("echo", "x" * 900) for _ in range(100)]  # type: ignore[func-returns-value]
        server.signal(signal.SIGCONT)
        assert client.with_options(timeout_s=30.0).call("echo", 1) == 1


# The asyncio client, and both kinds of server


@on_each_channel
@by_each_server
def test_the_asyncio_client_sends_too(channel: ChannelKind, address: str, kind: type[AnyServer]) -> None:
    """Nothing waits for the handler; errors are counted at the server; all arenas are free in the end."""
    gate = Gate()
    total: list[int] = []

    def add(x: torch.Tensor) -> torch.Tensor:
        gate.wait()
        total.append(int(x.sum()))
        return x

    async def main() -> None:
        handlers: dict[str, Any] = {"add": add, "fail": fail}
        async with (
            served(address, kind, **handlers) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            for value in range(10):
                await client.send("add", torch.full((1000,), value, dtype=torch.uint8))
                await client.with_options(timeout_s=20.0).send("fail")
            await client.send("no such method")
            assert total == []
            gate.open()
            assert await becomes(lambda: len(total) == 10)
            assert sorted(total) == [1000 * value for value in range(10)]
            assert await becomes(lambda: server.statistics().failures == 11)
            assert await becomes(lambda: server.statistics().calls == 21)
            assert client.statistics().failures == 0
            assert await wholly_free(client)

    asyncio.run(main())


@on_each_channel
def test_a_coroutine_may_be_called_one_way(
    channel: ChannelKind, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By both kinds of client; what it raises is logged."""
    seen: list[object] = []

    async def later(value: object) -> object:
        await asyncio.sleep(0)
        seen.append(value)
        if value == "fail":
            raise DeliberateError("in the loop")
        return object()

    async def main() -> None:
        async with (
            served(address, later=later) as server,
            AsyncClient(address, channel=channel) as client,
        ):
            await client.send("later", 1)

            def blocking() -> None:
                with Client(address, channel=channel) as other:
                    other.send("later", 2)
                    assert other.call("echo", 3) == 3

            await asyncio.to_thread(blocking)
            await client.send("later", "fail")
            assert await becomes(lambda: len(seen) == 3)
            assert await becomes(lambda: server.statistics().failures == 1)

    asyncio.run(main())
    assert set(seen) == {1, 2, "fail"}
    assert "DeliberateError: in the loop" in caplog.text


@on_each_channel
def test_the_asyncio_client_waits_for_room_to_send(channel: ChannelKind, address: str) -> None:
    """Many times as much as its arena holds; the loop goes on meanwhile."""
    total = 0

    def add(x: torch.Tensor) -> None:
        nonlocal total
        total += x.numel()

    async def main() -> None:
        async with (
            served(address, options={"threads": 1}, add=add),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            await asyncio.gather(*(client.send("add", torch.ones(5000)) for _ in range(50)))
            assert await becomes(lambda: total == 250_000)
            assert await wholly_free(client)
            with pytest.raises(TensorTooLarge):
                await client.send("add", torch.ones(ARENA_BYTES))
        with pytest.raises(Closed):
            await client.send("add", 1)

    asyncio.run(main())
