"""``AsyncClient``: which calls wait for room, which don't, and what failed calls hold; on both channels and loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from typing import Any

import pytest
import torch

from shmtransport import (
    ArenaFull,
    AsyncClient,
    CallTimeout,
    ChannelKind,
    LocalProtocolError,
    RemoteError,
    Server,
    TensorTooLarge,
)
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
    settle,
    wholly_free,
)

pytestmark = [in_each_loop, on_each_channel, pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_unhandled")]


@by_each_server
def test_calls_larger_than_the_arena_together_all_succeed(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer]
) -> None:
    """Each takes a third of the arena: they wait for the server to release, and the statistics count the waits."""

    async def main() -> None:
        async with (
            served(address, kind),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            size = ARENA_BYTES // 3 // 64 * 64
            tensors = [torch.full((size - i,), 1, dtype=torch.uint8) for i in range(60)]
            assert await asyncio.gather(*(client.call("size", x) for x in tensors)) == [size - i for i in range(60)]
            statistics = client.statistics()
            assert 0 < statistics.stalls <= 60, "a call that waits is one stall, however often it looks"
            assert statistics.stall_seconds > 0

    run(main())


def test_a_call_that_is_not_answered_keeps_no_argument_that_the_server_released(
    run: Run, channel: ChannelKind, address: str
) -> None:
    """Nothing of the client's refers to what its caller has dropped: another call has the room."""

    async def main() -> None:
        may_answer = asyncio.Event()

        async def forget(x: torch.Tensor) -> None:
            del x
            await may_answer.wait()

        async with (
            served(address, forget=forget),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            for caller in (client, client.with_options(timeout_s=50.0)):
                first = asyncio.create_task(caller.call("forget", client.empty((ARENA_BYTES,), torch.uint8)))
                await settle()
                whole = torch.zeros(ARENA_BYTES, dtype=torch.uint8)
                assert await caller.call("size", whole) == ARENA_BYTES
                assert not first.done()
                may_answer.set()
                await first
                may_answer.clear()

    run(main())


def test_where_waiting_can_not_help_there_is_no_wait(run: Run, channel: ChannelKind, address: str) -> None:
    """Loans that this side holds, or a tensor larger than the arena: an error at once, whatever ``timeout_s`` is."""

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES, "timeout_s": 3600.0}
        async with served(address), AsyncClient(address, **options) as client:
            loan = client.empty((ARENA_BYTES,), torch.uint8)
            with pytest.raises(ArenaFull, match=r"1 blocks held, none of them by the peer"):
                await client.call("size", torch.zeros(1))
            with pytest.raises(TensorTooLarge, match="raise arena_bytes"):
                await client.call("size", torch.zeros(ARENA_BYTES))
            assert client.statistics().stalls == 0
            assert await client.call("size", loan) == ARENA_BYTES
            del loan
            assert await wholly_free(client)

    run(main())


def test_the_wait_for_room_ends_with_the_calls_time(run: Run, channel: ChannelKind, address: str) -> None:
    """``ArenaFull`` with the facts, since nothing was sent; ``empty`` does not wait at all."""
    gate = Gate()

    def keep(x: torch.Tensor) -> int:
        gate.wait()
        return x.numel()

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES}
        async with served(address, keep=keep), AsyncClient(address, **options) as client:
            brief = client.with_options(timeout_s=0.1)
            whole = torch.zeros(ARENA_BYTES, dtype=torch.uint8)
            with pytest.raises(CallTimeout):
                await brief.call("keep", whole)
            with pytest.raises(ArenaFull, match="1 borrows by the peer"):
                await brief.call("size", torch.zeros(1))
            with pytest.raises(ArenaFull, match="1 borrows by the peer"):
                client.empty((1,), torch.uint8)
            gate.open()
            assert await wholly_free(client)

    run(main())


@by_each_server
def test_a_failed_call_keeps_nothing_until_a_collection(
    run: Run, channel: ChannelKind, address: str, kind: type[AnyServer], caplog: pytest.LogCaptureFixture
) -> None:
    """An error that was caught and dropped holds no argument: without garbage collection there is room for the next."""
    caplog.set_level(logging.CRITICAL, "shmtransport")  # a captured record would hold the traceback

    def fail(x: torch.Tensor) -> None:
        raise DeliberateError(f"not {x.numel()} bytes")

    async def main() -> None:
        async with (
            served(address, kind, fail=fail),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            for _ in range(3):
                loan = client.empty((ARENA_BYTES // 2,), torch.uint8)
                with contextlib.suppress(RemoteError):
                    await client.call("fail", loan)
                with contextlib.suppress(LocalProtocolError):
                    await client.call("no such", loan)
                with contextlib.suppress(LocalProtocolError):
                    await client.call("echo", loan, object())
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(client.call("size", loan), 0)
                with contextlib.suppress(RemoteError):
                    await client.call("fail", loan)
                del loan
            assert await wholly_free(client)

    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def test_a_full_queue_is_waited_for(run: Run, channel: ChannelKind, address: str) -> None:
    """More requests than the channel takes while the server reads nothing: all are answered, in the end."""
    gate = Gate()

    async def main() -> None:
        async with (
            served(address, Server, block=gate.wait),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            block = asyncio.create_task(client.call("block"))
            assert await becomes(lambda: gate.entered == 1)
            texts = [f"{i} " * 5000 for i in range(40)]  # a message ring takes about 130 KB
            tasks = [asyncio.create_task(client.call("echo", text)) for text in texts]
            if channel == "doorbell":
                assert await becomes(lambda: client.statistics().stalls > 0)
            cancelled = asyncio.create_task(client.call("echo", [torch.zeros(100), texts[-1]]))
            await settle()
            cancelled.cancel()
            gate.open()
            assert await asyncio.gather(*tasks) == texts
            assert await block is None
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert await client.call("echo", 1) == 1  # after the late reply, if the cancelled call was sent
            assert await wholly_free(client)

    run(main())


def test_a_queue_that_stays_full_is_a_call_timeout(run: Run, address: str, channel: ChannelKind) -> None:
    """After ``timeout_s`` the call says that it was not sent; it holds nothing. ZeroMQ queues more than this."""
    gate = Gate()

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES, "timeout_s": 0.15}
        async with served(address, Server, block=gate.wait), AsyncClient(address, **options) as client:
            calls = [client.call("block"), *(client.call("echo", [torch.zeros(10), "x" * 60_000]) for _ in range(9))]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, CallTimeout) for outcome in outcomes)
            unsent = sum("was not sent: the queue to the server stayed full" in str(outcome) for outcome in outcomes)
            assert unsent > 0 if channel == "doorbell" else unsent == 0
            gate.open()
            del outcomes
            while True:
                with contextlib.suppress(ArenaFull, CallTimeout):  # until the late replies have come
                    if await wholly_free(client):
                        break

    run(main())


def test_results_stay_valid_and_snapshots_hold_no_room(run: Run, channel: ChannelKind, address: str) -> None:
    """Borrowed results outlive the client; with ``snapshot=True`` any number of results can be kept."""

    async def main() -> None:
        options: dict[str, Any] = {"channel": channel, "arena_bytes": ARENA_BYTES}
        async with served(address):
            async with AsyncClient(address, **options) as client:
                held = await client.call("fill", ARENA_BYTES, 3)
                with pytest.raises(CallTimeout, match="1 received tensors are kept here"):
                    await client.with_options(timeout_s=0.05).call("fill", 1)
            assert (held == 3).all()
            async with AsyncClient(address, snapshot=True, **options) as client:
                kept = [await client.call("fill", ARENA_BYTES, i) for i in range(5)]
            assert [int(tensor[-1]) for tensor in kept] == list(range(5))

    run(main())
