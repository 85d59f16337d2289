"""Whatever a handler raises becomes its caller's error; it leaves nothing behind and ends no server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shmtransport import AsyncServer, Client, PeerDied, RemoteError, Server
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import KIB, DeliberateError, echo, mapped_segments

AnyServer = Server | AsyncServer
Start = Callable[..., tuple[AnyServer, "concurrent.futures.Future[None]"]]


class Panic(BaseException):
    """An exception like those that extensions in other languages raise."""


def _serve(server: AnyServer) -> None:
    """Serve until the end, in this thread."""
    if isinstance(server, Server):
        with server:
            server.serve()
        return

    async def main() -> None:
        async with server:
            await server.serve()

    asyncio.run(main())


def _as_coroutine(handler: Callable[..., Any]) -> Callable[..., Any]:
    async def coroutine(*arguments: Any) -> Any:
        return handler(*arguments)

    return coroutine


@pytest.fixture(params=["blocking", "coroutine", "thread"])
def start(request: pytest.FixtureRequest, address: str) -> Iterator[Start]:
    """Start a server of each kind in a thread, with handlers of each kind; report how its serving ended."""
    executor = concurrent.futures.ThreadPoolExecutor(1)
    servers: list[AnyServer] = []

    def begin(**handlers: Callable[..., Any]) -> tuple[AnyServer, concurrent.futures.Future[None]]:
        server: AnyServer = Server(address) if request.param == "blocking" else AsyncServer(address)
        for name, handler in handlers.items():
            server.register(name, _as_coroutine(handler) if request.param == "coroutine" else handler)
        servers.append(server)
        return server, executor.submit(_serve, server)

    yield begin
    for server in servers:
        server.stop()
    executor.shutdown()


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*_arguments: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError("no"),
        concurrent.futures.CancelledError("no"),
        GeneratorExit("no"),
        Panic("no"),
    ],
    ids=lambda error: type(error).__module__ + "." + type(error).__name__,
)
def test_any_base_exception_is_its_callers_failure(
    start: Start, address: str, channel: ChannelKind, error: BaseException
) -> None:
    """All but the two that end a program; the server answers the next call."""
    _, served = start(fail=_raise(error), echo=echo)
    with Client(address, channel=channel, timeout_s=10.0) as client:
        for _ in range(2):
            with pytest.raises(RemoteError, match=f"raised {type(error).__name__}: no"):
                client.call("fail")
            assert client.call("echo", 1) == 1
    assert not served.done()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
def test_what_ends_a_program_ends_serving(
    start: Start, address: str, channel: ChannelKind, error: BaseException
) -> None:
    """As documented: it leaves ``serve``, the caller learns that the server has gone, and the address is free."""
    _, served = start(fail=_raise(error))
    with Client(address, channel=channel, timeout_s=10.0) as client, pytest.raises(PeerDied):
        client.call("fail")
    with pytest.raises(type(error)):
        served.result(10)
    Server(address).close()


_COMES_S = 0.2  # by then the request behind it has come as well


def test_closing_in_a_handler_ends_serving_in_order(start: Start, address: str, channel: ChannelKind) -> None:
    """The call is answered, others that had come too; then the server is closed."""
    closing: list[Callable[[], Any]] = []

    def close() -> Any:
        time.sleep(_COMES_S)
        result = closing[0]()
        return "closed" if result is None else result

    server, served = start(close=close, echo=echo)

    async def awaited() -> str:
        await asyncio.sleep(_COMES_S)
        await server.close()  # type: ignore[misc]
        return "closed"

    closing.append(server.close if isinstance(server, Server) else awaited)
    if isinstance(server, AsyncServer):
        server._handlers.by_name["close"] = awaited
    with Client(address, channel=channel, timeout_s=10.0) as client:
        pending = [client.submit("echo", 1), client.submit("close"), client.submit("echo", 2)]
        assert [one.result() for one in pending] == [1, "closed", 2]
        served.result(10)
        with pytest.raises(PeerDied):
            client.call("echo")
    assert not os.path.exists(address.removeprefix("ipc://"))
    server.close() if isinstance(server, Server) else asyncio.run(server.close())


def test_closing_while_another_thread_serves_stops_it(address: str, channel: ChannelKind) -> None:
    """In order, and the address is free when ``close`` returns."""
    server = Server(address)
    server.register("echo", echo)
    thread = threading.Thread(target=server.serve)
    thread.start()
    with Client(address, channel=channel) as client:
        assert client.call("echo", 1) == 1
        server.close()
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(PeerDied):
            client.call("echo")
    Server(address).close()


def test_kept_log_records_hold_nothing_of_the_caller(
    start: Start, address: str, channel: ChannelKind, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the server's own, nor one that the handler makes of what it caught; both arenas are free at once."""
    other = logging.getLogger("tests.handler")

    def inner(x: torch.Tensor) -> None:
        raise DeliberateError(f"not {x.numel()} bytes")

    def fail(x: torch.Tensor) -> None:
        try:
            inner(x)
        except DeliberateError:
            other.exception("it failed")
            raise

    start(fail=fail)
    gc.disable()
    try:
        with Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=10.0) as client:
            for _ in range(4):
                loan = client.empty((48 * KIB,), torch.uint8)
                with pytest.raises(RemoteError):
                    client.call("fail", loan)
                del loan
    finally:
        gc.enable()
    assert len([record for record in caplog.records if record.name == "tests.handler" and record.exc_info]) == 4
    assert len([record for record in caplog.records if "DeliberateError: not 49152 bytes" in record.getMessage()]) == 4


def test_kept_errors_hold_no_argument(start: Start, address: str, channel: ChannelKind) -> None:
    """A caller may keep a RemoteError for as long as it likes."""
    start(fail=lambda _x: _raise(DeliberateError())())
    kept = []
    with Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=10.0) as client:
        for _ in range(4):
            with pytest.raises(RemoteError) as caught:
                client.call("fail", client.empty((48 * KIB,), torch.uint8))
            kept.append(caught.value)
    assert len(kept) == 4


def test_what_a_handler_starts_does_not_keep_its_caller(address: str) -> None:
    """An endless task has a copy of the handler's context, which must not hold a client that has gone."""
    before = mapped_segments(os.getpid())

    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []
        gone = asyncio.Event()

        async def begin(_x: torch.Tensor) -> int:
            tasks.append(asyncio.create_task(asyncio.sleep(3600)))
            return server.connection_id

        server = AsyncServer(address)
        server.register("begin", begin)
        server.on_disconnect(lambda _number: gone.set())
        serving = asyncio.create_task(server.serve())

        def call() -> None:
            with Client(address, arena_bytes=64 * KIB) as client:
                client.call("begin", torch.ones(4))

        await asyncio.to_thread(call)
        await gone.wait()
        await asyncio.sleep(0.1)
        gc.collect()
        assert mapped_segments(os.getpid()) <= before
        for task in tasks:
            task.cancel()
        server.stop()
        await serving
        await server.close()

    asyncio.run(main())
