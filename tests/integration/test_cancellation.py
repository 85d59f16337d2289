"""Calls that their clients give up: what the server leaves out or ends, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shmtransport import AsyncClient, AsyncServer, CallCancelled, CallTimeout, Client, LocalProtocolError
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import KIB
from tests.support.helpers import DeliberateError, Serve, echo, eventually
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

pytestmark = pytest.mark.timeout(60)

A_WHILE_S = 0.1  # what has not happened by then is not about to


class Waiting:
    """A coroutine handler that waits for ever, and what becomes of its calls."""

    def __init__(self) -> None:
        self.begun = self.cancelled = self.ended = 0

    async def __call__(self, x: object = None) -> None:
        self.begun += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    def all_were_cancelled(self, count: int) -> bool:
        return self.begun == self.cancelled == self.ended == count


# The asyncio server: coroutines are cancelled


@in_each_loop
@on_each_channel
@pytest.mark.parametrize("how", ["cancel", "wait_for", "timeout_s"])
def test_a_given_up_call_cancels_its_coroutine(run: Run, channel: ChannelKind, address: str, how: str) -> None:
    """By cancelling the task that waits for it, or by its time; the arguments are released, and others go on."""
    waiting = Waiting()

    async def main() -> None:
        async def wait(x: object = None) -> None:
            await waiting(x)

        async with (
            served(address, wait=wait) as server,
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            other = asyncio.create_task(client.call("wait"))
            assert await becomes(lambda: waiting.begun == 1)
            caller = client.with_options(timeout_s=0.2) if how == "timeout_s" else client
            task = asyncio.create_task(caller.call("wait", torch.ones(1000)))
            assert await becomes(lambda: waiting.begun == 2)
            if how == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "wait_for":
                with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                    await asyncio.wait_for(task, 0.01)
            else:
                with pytest.raises(CallTimeout):
                    await task
            del task
            assert await becomes(lambda: waiting.cancelled == 1)
            assert (waiting.begun, waiting.ended) == (2, 1)
            assert await wholly_free(client)
            assert server.statistics().failures == 0
            other.cancel()
            assert await becomes(lambda: waiting.all_were_cancelled(2))

    run(main())


@on_each_channel
@pytest.mark.parametrize("how", ["cancel", "timeout_s"])
def test_a_blocking_client_cancels_a_coroutine_too(channel: ChannelKind, address: str, how: str) -> None:
    """By ``PendingReply.cancel``, or by a call whose time is over; a wait that runs out does not."""
    waiting = Waiting()

    async def main() -> None:
        async def wait() -> None:
            await waiting()

        async with served(address, wait=wait):

            def blocking() -> None:
                with Client(address, channel=channel) as client:
                    if how == "cancel":
                        pending = client.submit("wait")
                        with pytest.raises(CallTimeout):
                            pending.result(0.05)
                        assert client.call("echo", 1) == 1
                        assert eventually(lambda: waiting.begun == 1)
                        assert waiting.cancelled == 0
                        assert pending.cancel()
                        with pytest.raises(CallCancelled):
                            pending.result()
                    else:
                        with pytest.raises(CallTimeout):
                            client.with_options(timeout_s=0.2).call("wait")
                    assert client.call("echo", 1) == 1
                    assert eventually(lambda: waiting.all_were_cancelled(1))

            await asyncio.to_thread(blocking)

    asyncio.run(main())


@on_each_channel
def test_what_a_cancelled_coroutine_does_is_its_own_matter(channel: ChannelKind, address: str) -> None:
    """It may refuse to end, raise something else or return: its client hears nothing of it."""
    done: list[str] = []

    async def stubborn(how: str) -> torch.Tensor:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            done.append(how)
            if how == "raise":
                raise DeliberateError from None
        return torch.ones(1000)

    async def main() -> None:
        async with (
            served(address, stubborn=stubborn),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            for how in ("return", "raise"):
                task = asyncio.create_task(client.call("stubborn", how))
                await client.call("echo", 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
                assert await becomes(lambda: how in done)  # noqa: B023 - it is awaited here
            assert await client.call("echo", 2) == 2
            assert await wholly_free(client)

    asyncio.run(main())


@on_each_channel
def test_a_cancelled_call_is_in_progress_no_longer(channel: ChannelKind, address: str) -> None:
    """It leaves its place among ``max_calls_in_progress``, also if it is cancelled before it begins."""
    waiting = Waiting()

    async def has_a_place(client: AsyncClient) -> bool:
        try:
            return bool(await client.call("echo", 1) == 1)
        except LocalProtocolError:
            return False

    async def main() -> None:
        async def wait() -> None:
            await waiting()

        async with (
            served(address, options={"max_calls_in_progress": 2}, wait=wait),
            AsyncClient(address, channel=channel) as client,
        ):
            for _ in range(20):
                tasks = [asyncio.create_task(client.call("wait")) for _ in range(2)]
                await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(one) for one in outcomes} <= {asyncio.CancelledError}
            while waiting.begun > waiting.ended or not await has_a_place(client):
                await asyncio.sleep(0.01)
            tasks = [asyncio.create_task(client.call("wait")) for _ in range(2)]
            assert await becomes(lambda: waiting.begun - waiting.ended == 2)
            with pytest.raises(LocalProtocolError, match="max_calls_in_progress is 2"):
                await client.call("echo", 1)
            for task in tasks:
                task.cancel()
            assert await becomes(lambda: waiting.begun == waiting.ended)
            assert await client.call("echo", 1) == 1

    asyncio.run(main())


@on_each_channel
def test_a_plain_function_that_runs_goes_on_and_one_that_waits_does_not(channel: ChannelKind, address: str) -> None:
    """At the asyncio server: a thread can't be ended, but what has not begun there never will."""
    gate = Gate()
    seen: list[int] = []

    def block(value: int) -> torch.Tensor:
        seen.append(value)
        gate.wait()
        return torch.ones(1000)

    async def main() -> None:
        async with (
            served(address, options={"threads": 1}, block=block),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            tasks = [asyncio.create_task(client.call("block", value)) for value in range(4)]
            assert await becomes(lambda: gate.entered == 1)
            for task in tasks[:3]:
                task.cancel()
            await asyncio.gather(*tasks[:3], return_exceptions=True)
            await asyncio.sleep(A_WHILE_S)
            gate.open()
            assert (await tasks[3]).numel() == 1000
            tasks.clear()
            assert seen == [0, 3]
            assert await becomes(lambda: gate.left == 2)
            assert await wholly_free(client)

    asyncio.run(main())


# The blocking server: what has not begun is left out


@pytest.mark.parametrize("how", ["cancel", "timeout_s"])
def test_a_call_that_waits_for_its_turn_is_left_out(serve: Serve, address: str, channel: ChannelKind, how: str) -> None:
    """With several threads; its arguments are released, and the calls around it are handled."""
    gate = Gate()
    seen: list[int] = []

    def add(number: int, x: object = None) -> int:
        seen.append(number)
        return number

    serve(options={"threads": 2}, block=gate.wait, add=add, size=lambda x: x.numel(), echo=echo)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client, Client(address) as other:
        first = client.submit("block")
        assert eventually(lambda: gate.entered == 1)
        before = client.submit("add", 1)
        if how == "cancel":
            pending = [client.submit("add", 2, torch.ones(4 * KIB)) for _ in range(3)]
            assert [one.cancel() for one in pending] == [True] * 3
            del pending
        else:
            with pytest.raises(CallTimeout):
                client.with_options(timeout_s=0.2).call("add", 2, torch.ones(4 * KIB))
        whole = torch.zeros(ARENA_BYTES, dtype=torch.uint8)
        after = client.submit("size", whole)  # it waits until the arguments have been released
        assert other.call("echo", 1) == 1
        gate.open()
        assert first.result() is None
        assert before.result() == 1
        assert after.result() == ARENA_BYTES
        assert seen == [1]


def test_a_handler_that_runs_is_not_interrupted(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Its late result is dropped; its client's next call comes after it, in order."""
    gate = Gate()
    server = serve(options={"threads": 2}, echo=echo)

    def block() -> torch.Tensor:
        gate.wait()
        return server.empty((ARENA_BYTES,), torch.uint8)

    server.register("block", block)
    server.register("fill", lambda: server.empty((ARENA_BYTES,), torch.uint8).fill_(3))
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        pending = client.submit("block")
        assert eventually(lambda: gate.entered == 1)
        assert pending.cancel()
        next_one = client.submit("echo", 1)
        time.sleep(A_WHILE_S)
        assert not next_one.done()
        gate.open()
        assert next_one.result() == 1
        assert gate.left == 1
        assert bool((client.call("fill") == 3).all())


@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_of_a_call_that_was_given_up_waits_for_no_room(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """Whenever it was given up, before its handler has returned or after: it takes no other reply's place."""
    gate = Gate()
    server = serve(options={"threads": threads}, echo=echo)

    def fill(nbytes: int, value: int) -> torch.Tensor:
        if value == 2:
            gate.wait()
        return server.empty((nbytes,), torch.uint8).fill_(value)

    server.register("fill", fill)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        held = client.call("fill", 40 * KIB, 1)
        given_up = client.submit("fill", 40 * KIB, 2)
        assert eventually(lambda: gate.entered == 1)
        assert given_up.cancel()
        time.sleep(A_WHILE_S)
        gate.open()
        assert client.call("echo", 1) == 1
        waiting = client.submit("fill", 60 * KIB, 3)  # there is room for it among what waits, if that is all
        assert client.call("echo", 2) == 2
        assert bool((held == 1).all())
        del held
        assert bool((waiting.result() == 3).all())


def test_a_cancelled_call_of_another_client_is_another_call(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Both clients number their calls from 0."""
    gate = Gate()
    serve(options={"threads": 3}, block=gate.wait, echo=echo)
    with Client(address, channel=channel) as one, Client(address, channel=channel) as other:
        both = [client.submit("block") for client in (one, other)]
        queued = [client.submit("echo", number) for number, client in enumerate((one, other))]
        assert eventually(lambda: gate.entered == 2)
        assert queued[0].cancel()
        gate.open()
        assert queued[1].result() == 1
        assert [pending.result() for pending in both] == [None, None]


# Both servers


def _by_cancel(client: Client, turn: int) -> None:
    pending = client.submit("double", torch.full((1000,), float(turn)))
    if turn % 3 == 0:
        threading.Event().wait(0.0005)
    pending.cancel()


def _by_timeout(client: Client, turn: int) -> None:
    try:
        result = client.with_options(timeout_s=0.0003 * (turn % 4)).call("double", torch.full((1000,), float(turn)))
    except CallTimeout:
        return
    assert bool((result == 2.0 * turn).all())


@on_each_channel
@by_each_server
@pytest.mark.parametrize("give_up", [_by_cancel, _by_timeout])
def test_a_cancellation_may_cross_the_reply(
    channel: ChannelKind, address: str, kind: type[AnyServer], give_up: Callable[[Client, int], None]
) -> None:
    """Hundreds of calls given up about when they are answered: those between them are right, all room comes back."""

    async def main() -> None:
        options: dict[str, Any] = {} if kind is AsyncServer else {"threads": 3}
        async with served(address, kind, options):

            def blocking() -> None:
                with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
                    for turn in range(200):
                        give_up(client, turn)
                        if turn % 5 == 0:
                            x = torch.full((1000,), float(turn))
                            assert torch.equal(client.call("double", x), x * 2)
                    assert eventually(lambda: _is_free(client))

            await asyncio.to_thread(blocking)

    asyncio.run(main())


def _is_free(client: Client) -> bool:
    try:
        free = bool((client.call("fill", ARENA_BYTES, 7) == 7).all())
    except Exception:  # noqa: BLE001 - what was given up still runs
        return False
    return free and client.call("size", torch.zeros(ARENA_BYTES, dtype=torch.uint8)) == ARENA_BYTES


@on_each_channel
@by_each_server
def test_cancelled_tasks_may_cross_their_replies(channel: ChannelKind, address: str, kind: type[AnyServer]) -> None:
    """The same from an event loop."""

    async def main() -> None:
        async with (
            served(address, kind),
            AsyncClient(address, channel=channel, arena_bytes=ARENA_BYTES) as client,
        ):
            right = cancelled = 0
            for turn in range(100):
                tasks = [asyncio.create_task(client.call("double", torch.full((500,), 1.0 * i))) for i in range(5)]
                await asyncio.sleep(0.0002 * (turn % 8))
                for task in tasks[turn % 5 :]:
                    task.cancel()
                for i, outcome in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                    if isinstance(outcome, torch.Tensor):
                        right += bool((outcome == 2.0 * i).all())
                    else:
                        assert isinstance(outcome, asyncio.CancelledError)
                        cancelled += 1
                del tasks, task, outcome
            assert right + cancelled == 500
            assert right > 0
            assert cancelled > 0
            deadline = time.monotonic() + 10.0
            while not (free := await _wholly_free(client)) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert free

    asyncio.run(main())


async def _wholly_free(client: AsyncClient) -> bool:
    try:
        return await wholly_free(client)
    except Exception:  # noqa: BLE001 - what was cancelled still runs
        return False
