"""``Server(threads=N)`` and ``AsyncServer(threads=N)``: what runs at the same time, and how it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from shmtransport import AsyncClient, AsyncServer, Client, Closed, LocalProtocolError, PeerDied, RemoteError, Server
from shmtransport.channels.backlog import QUEUE_LIMIT
from shmtransport.protocol.messages import ChannelKind
from shmtransport.units import KIB
from tests.support.helpers import DeliberateError, Serve, Spawn, echo, eventually, in_thread, undisturbed
from tests.support.left_behind import kill
from tests.support.loops import Gate, becomes, on_each_channel, served
from tests.support.process import ROOT

pytestmark = pytest.mark.timeout(60)

CLIENT = ROOT / "tests/support/processes/streaming_client.py"
ARENA_BYTES = 64 * KIB
A_WHILE_S = 0.1  # what has not happened by then is not about to


class Started:
    """A server with several threads that serves in one of the test's, which tells how ``serve`` ended."""

    def __init__(self, address: str, threads: int = 3, **options: Any) -> None:
        self.server = Server(address, threads=threads, **options)
        self.serving: Future[Any] = Future()

    def serve(self, **handlers: Callable[..., Any]) -> Server:
        for name, handler in handlers.items():
            self.server.register(name, handler)
        self.serving = in_thread(self.server.serve)
        return self.server


# Whose handlers run at the same time


def test_handlers_of_different_clients_run_at_the_same_time(serve: Serve, address: str, channel: ChannelKind) -> None:
    """As many as there are threads meet each other; one more has to wait."""
    meeting = threading.Barrier(4)
    gate = Gate()
    server = serve(options={"threads": 4}, meet=lambda: meeting.wait(30.0) >= 0, block=gate.wait, echo=echo)
    clients = [Client(address, channel=channel) for _ in range(5)]
    try:
        meetings = [client.submit("meet") for client in clients[:4]]
        assert [one.result() for one in meetings] == [True] * 4
        blocked = [client.submit("block") for client in clients[:4]]
        assert eventually(lambda: gate.entered == 4)
        waiting = clients[4].submit("echo", 1)
        time.sleep(A_WHILE_S)
        assert not waiting.done()
        gate.open()
        assert waiting.result() == 1
        for one in blocked:
            one.result()
        assert server.statistics().calls == 9
    finally:
        gate.open()
        for client in clients:
            client.close()


def test_calls_of_one_client_come_one_at_a_time_and_in_order(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Whatever their kind, and from however many of its threads; others run beside them."""
    running = most = 0
    seen: list[int] = []

    def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002)
        seen.append(number)
        running -= 1
        return number

    serve(options={"threads": 4}, work=work, echo=echo, double=lambda x: x * 2)
    with undisturbed(address, channel), Client(address, channel=channel) as client:
        pending = []
        for number in range(0, 60, 2):
            client.send("work", number)
            pending.append(client.submit("work", number + 1))
        assert [one.result() for one in pending] == list(range(1, 60, 2))
        assert seen == list(range(60))
        workers = [in_thread(client.call, "work", number) for number in range(10)]
        assert sorted(one.result(30.0) for one in workers) == list(range(10))
    assert most == 1


def test_a_slow_client_delays_no_other(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Many calls of one that wait for their turn take one thread only."""
    gate = Gate()
    serve(options={"threads": 2}, block=gate.wait, echo=echo)
    with Client(address, channel=channel) as slow, Client(address, channel=channel) as quick:
        blocked = [slow.submit("block") for _ in range(50)]
        assert eventually(lambda: gate.entered == 1)
        for number in range(50):
            assert quick.call("echo", number) == number
        assert gate.entered == 1
        gate.open()
        for one in blocked:
            one.result()
        assert gate.entered == 50


def test_every_handler_knows_its_caller(serve: Serve, address: str, channel: ChannelKind) -> None:
    """``connection_id`` and ``empty`` are those of the call, in whichever thread it runs; nothing is copied."""
    server = serve(options={"threads": 3})

    def who(value: int) -> tuple[int, torch.Tensor]:
        tensor = server.empty((100,), torch.int64).fill_(value)
        time.sleep(0.001)
        return server.connection_id, tensor

    server.register("who", who)

    def work(value: int) -> set[int]:
        numbers = set()
        with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
            for turn in range(30):
                number, tensor = client.call("who", value + turn)
                assert bool((tensor == value + turn).all())
                del tensor
                numbers.add(number)
        return numbers

    working = [in_thread(work, 1000 * number) for number in range(6)]
    numbers = [one.result(50.0) for one in working]
    assert sorted(min(one) for one in numbers) == list(range(1, 7))
    assert [len(one) for one in numbers] == [1] * 6
    assert server.statistics().tensors_copied == 0
    with pytest.raises(LocalProtocolError, match="only inside a handler"):
        _ = server.connection_id


def test_errors_reach_their_own_callers(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Several clients whose handlers raise at the same time."""

    def fail(text: str) -> None:
        raise DeliberateError(text)

    server = serve(options={"threads": 3}, fail=fail)

    def work(number: int) -> None:
        with Client(address, channel=channel) as client:
            for turn in range(20):
                with pytest.raises(RemoteError, match=f"DeliberateError: {number}/{turn}$"):
                    client.call("fail", f"{number}/{turn}")

    for one in [in_thread(work, number) for number in range(5)]:
        one.result(50.0)
    assert server.statistics().failures == server.statistics().calls == 100


def test_one_client_may_not_queue_without_end(serve: Serve, address: str) -> None:
    """Beyond the limit its calls fail, with the figures, and one-way calls are logged; the others are handled."""
    gate = Gate()
    server = serve(options={"threads": 2}, block=gate.wait, echo=echo)
    with Client(address) as client, Client(address) as other:
        first = client.submit("block")
        assert eventually(lambda: gate.entered == 1)
        for _ in range(QUEUE_LIMIT):
            client.send("echo")
        beyond = client.submit("echo", 1)
        with pytest.raises(LocalProtocolError, match=rf"{QUEUE_LIMIT} calls of this client .* wait for their turn"):
            beyond.result()
        client.send("echo", "beyond")
        assert other.call("echo", 2) == 2
        assert eventually(lambda: server.statistics().failures == 2)
        gate.open()
        first.result()
        assert client.call("echo", 3) == 3
    assert server.statistics().failures == 2


# How it ends


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_handler_may_end_the_server(address: str, channel: ChannelKind, error: BaseException) -> None:
    """``serve`` raises what its handler raised, in the serving thread; the callers get no reply."""
    started = Started(address)

    def leave() -> None:
        raise error

    with started.serve(leave=leave, echo=echo) as server, Client(address, channel=channel) as client:
        assert client.call("echo", 1) == 1
        pending = client.submit("leave")
        assert type(started.serving.exception(30.0)) is type(error)
        server.close()
        with pytest.raises(PeerDied):
            pending.result()


def test_a_handler_may_close_the_server(address: str, channel: ChannelKind) -> None:
    """``close`` returns at once there; what had arrived is answered, and then the server is closed."""
    started = Started(address)
    closed_after: list[float] = []

    def close() -> str:
        before = time.monotonic()
        started.server.close()
        closed_after.append(time.monotonic() - before)
        return "closing"

    started.serve(close=close, echo=echo)
    with Client(address, channel=channel) as client:
        assert client.call("close") == "closing"
        assert started.serving.exception(30.0) is None
        with pytest.raises(PeerDied):
            client.call("echo", 1)
    assert closed_after[0] < 2.0
    with pytest.raises(Closed):
        started.server.serve()


def test_close_in_another_thread_waits_for_the_calls_in_progress(address: str, channel: ChannelKind) -> None:
    """They are answered first."""
    started = Started(address)
    gate = Gate()

    def block() -> str:
        gate.wait()
        return "done"

    started.serve(block=block)
    with Client(address, channel=channel) as one, Client(address, channel=channel) as other:
        pending = [one.submit("block"), other.submit("block")]
        assert eventually(lambda: gate.entered == 2)
        closing = in_thread(started.server.close)
        time.sleep(A_WHILE_S)
        assert not closing.done()
        gate.open()
        closing.result(30.0)
        assert [reply.result() for reply in pending] == ["done"] * 2
    assert started.serving.result(0) is None


def test_stop_lets_what_has_arrived_be_handled(address: str, channel: ChannelKind) -> None:
    """Calls that run and calls that wait for their turn, of all clients."""
    started = Started(address, threads=2)
    gate = Gate()

    def work(value: int) -> int:
        gate.wait()
        return value

    server = started.serve(work=work)
    clients = [Client(address, channel=channel) for _ in range(4)]
    pending = [client.submit("work", value) for value in range(3) for client in clients]
    assert eventually(lambda: gate.entered == 2)
    server.stop()
    time.sleep(A_WHILE_S)
    assert not started.serving.done()
    gate.open()
    assert [reply.result() for reply in pending] == [value for value in range(3) for _ in clients]
    assert started.serving.result(30.0) is None
    assert gate.left == 12
    server.close()
    for client in clients:
        client.close()


def test_a_call_that_takes_too_long_is_not_waited_for(
    address: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``drain_timeout_s`` the server ends without it; its caller gets PeerDied."""
    monkeypatch.setattr("shmtransport.endpoints.server._STREAMS_END_S", 0.2)
    started = Started(address, drain_timeout_s=0.2)
    gate = Gate()
    with started.serve(block=gate.wait, echo=echo) as server, Client(address, channel=channel) as client:
        pending = client.submit("block")
        waiting = client.submit("echo", 1)
        assert eventually(lambda: gate.entered == 1)
        server.stop()
        assert started.serving.result(30.0) is None
        server.close()
        for reply in (pending, waiting):
            with pytest.raises(PeerDied):
                reply.result()
        gate.open()
        assert eventually(lambda: gate.left == 1)


def test_a_stopped_server_may_serve_again(address: str, channel: ChannelKind) -> None:
    """With the same threads and clients, also after a handler has ended ``serve``."""
    started = Started(address)

    def leave() -> None:
        raise SystemExit

    with started.serve(leave=leave, echo=echo) as server, Client(address, channel=channel) as client:
        assert client.call("echo", 1) == 1
        client.send("leave")
        assert isinstance(started.serving.exception(30.0), SystemExit)
        again = in_thread(server.serve)
        assert client.call("echo", 2) == 2
        before = time.monotonic()
        server.stop()
        assert again.result(30.0) is None
        assert time.monotonic() - before < 4.0, "nothing is in progress that it could wait for"


# Killed clients


def test_a_killed_client_leaves_nothing(serve: Serve, spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """The call that runs ends by itself and answers no one; the one that waits for its turn is never begun."""
    gate = Gate()
    gone: list[int] = []
    server = serve(options={"threads": 3})

    def block() -> torch.Tensor:
        gate.wait()
        return server.empty((1000,), torch.uint8)

    server.register("block", block)
    server.register("double", lambda x: x * 2)
    server.on_disconnect(gone.append)
    client = spawn(CLIENT, address, channel, "call")
    assert eventually(lambda: gate.entered == 1)
    with undisturbed(address, channel):
        kill(client)
        assert eventually(lambda: gone == [1])
        gate.open()
        assert eventually(lambda: gate.left == 1)
    time.sleep(A_WHILE_S)
    assert gate.entered == 1


def test_arguments_of_a_client_that_has_gone_stay_readable(serve: Serve, address: str, channel: ChannelKind) -> None:
    """A handler that still runs may use what it was called with."""
    gate = Gate()
    totals: list[int] = []

    def add(x: torch.Tensor) -> None:
        gate.wait()
        totals.append(int(x.sum()))

    server = serve(options={"threads": 2}, add=add)
    with Client(address, channel=channel, arena_bytes=ARENA_BYTES) as client:
        client.submit("add", torch.ones(ARENA_BYTES, dtype=torch.uint8))
        assert eventually(lambda: gate.entered == 1)
    assert eventually(lambda: not server._connections)
    gate.open()
    assert eventually(lambda: totals == [ARENA_BYTES])


# Options


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, "2", True, None])
def test_a_number_of_threads_beyond_its_limits_is_refused(address: str, threads: Any) -> None:
    """1 to 1024; the asyncio server takes None too."""
    with pytest.raises(LocalProtocolError, match="threads"):
        Server(address, threads=threads)
    if threads is not None:
        with pytest.raises(LocalProtocolError, match="threads"):
            AsyncServer(address, threads=threads)


@on_each_channel
@pytest.mark.parametrize("threads", [1, 3])
def test_the_asyncio_server_has_a_pool_of_that_size(channel: ChannelKind, address: str, threads: int) -> None:
    """So many plain functions run at the same time, of one client or several; coroutines run beside them."""
    gate = Gate()

    async def soon(value: int) -> int:
        await asyncio.sleep(0)
        return value

    async def main() -> None:
        async with (
            served(address, options={"threads": threads}, block=gate.wait, soon=soon),
            AsyncClient(address, channel=channel) as one,
            AsyncClient(address, channel=channel) as other,
        ):
            tasks = [asyncio.create_task((one, other)[i % 2].call("block")) for i in range(6)]
            assert await becomes(lambda: gate.entered == threads)
            await asyncio.sleep(A_WHILE_S)
            assert gate.entered == threads
            assert await one.call("soon", 1) == 1
            await asyncio.to_thread(time.sleep, 0)  # asyncio's own threads are free
            gate.open()
            await asyncio.gather(*tasks)
            assert gate.left == 6

    asyncio.run(main())
