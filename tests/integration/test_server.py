"""``Server`` apart from its calls: registration, connections and their ends, and the methods that every server has."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport import (
    AsyncClient,
    AsyncServer,
    Client,
    LocalProtocolError,
    RemoteError,
    Server,
    TensorTooLarge,
)
from shmtransport.endpoints.built_in import ECHO, PROBE
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import (
    MIB,
    DeliberateError,
    Serve,
    echo,
    eventually,
)


def test_every_server_echoes_and_probes(serve: Serve, address: str) -> None:
    """Without any handler: a tensor comes back copied; a number of bytes, made in place; nothing returns nothing."""
    serve()
    with Client(address, arena_bytes=MIB) as client:
        assert client.call(ECHO) is None
        for x in (torch.arange(1000.0), torch.empty(0), torch.tensor(3), torch.ones(3, 4, dtype=torch.bfloat16)):
            y = client.call(ECHO, x)
            assert torch.equal(x, y)
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            del y
        before = client.statistics().tensors_copied
        loan = client.empty((MIB // 2,), torch.uint8)
        for nbytes in (0, 1, MIB):
            found = client.call(PROBE, nbytes, loan)
            assert (found.dtype, tuple(found.shape)) == (torch.uint8, (nbytes,))
            del found
        assert client.statistics().tensors_copied == before


def test_a_probe_shows_nothing_of_another_client(serve: Serve, address: str) -> None:
    """Uninitialised bytes are the caller's own reply arena's: zero at first, then what it was sent before."""
    serve()
    with Client(address, arena_bytes=MIB) as first, Client(address, arena_bytes=MIB) as second:
        first.call(ECHO, torch.full((MIB,), 77, dtype=torch.uint8))
        assert not second.call(PROBE, MIB).any()


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind"),
    [
        ((ECHO, 1), {}, LocalProtocolError),
        ((ECHO, [torch.ones(3)]), {}, LocalProtocolError),
        ((ECHO, np.ones(3)), {}, LocalProtocolError),
        ((ECHO, "x" * 1000), {}, LocalProtocolError),
        ((ECHO, None, None), {}, RemoteError),
        ((ECHO,), {"self": 1}, RemoteError),
        ((PROBE,), {}, RemoteError),
        ((PROBE, -1), {}, LocalProtocolError),
        ((PROBE, True), {}, LocalProtocolError),
        ((PROBE, 1.0), {}, LocalProtocolError),
        ((PROBE, None), {}, LocalProtocolError),
        ((PROBE, torch.tensor(5)), {}, LocalProtocolError),
        ((PROBE, [1, 2]), {}, LocalProtocolError),
        ((PROBE, MIB + 1), {}, TensorTooLarge),
        ((PROBE, 2**63 - 1), {}, TensorTooLarge),
        ((PROBE, 2**64 - 1), {}, TensorTooLarge),
        (("__init__",), {}, LocalProtocolError),
        (("__class__",), {}, LocalProtocolError),
    ],
)
def test_nonsense_arguments_are_the_callers_error(
    serve: Serve, address: str, arguments: tuple[Any, ...], keywords: dict[str, Any], kind: type[Exception]
) -> None:
    """The server serves on, and nothing stays held."""
    serve()
    with Client(address, arena_bytes=MIB) as client:
        with pytest.raises(kind):
            client.call(*arguments, **keywords)
        assert client.call(PROBE, MIB).nbytes == MIB
        assert torch.equal(client.call(ECHO, torch.ones(MIB // 4)), torch.ones(MIB // 4))


def test_such_names_can_not_be_registered_and_are_not_listed(serve: Serve, address: str) -> None:
    """They belong to the server; the error for an unknown method lists the user's handlers alone."""
    server = serve(echo=echo)
    for name in (ECHO, PROBE, "__anything"):
        with pytest.raises(LocalProtocolError, match="the server's own"):
            server.register(name, echo)
    with Client(address) as client, pytest.raises(LocalProtocolError, match=r"'nope'; there are: echo$"):
        client.call("nope")


def test_an_async_server_answers_them_too(address: str) -> None:
    """An asyncio server can be measured like any other."""

    async def ask() -> None:
        async with AsyncServer(address) as server:
            serving = asyncio.create_task(server.serve())
            async with AsyncClient(address, arena_bytes=MIB) as client:
                assert await client.call(ECHO) is None
                assert (await client.call(PROBE, MIB)).nbytes == MIB
                assert (await client.call(ECHO, torch.arange(5))).tolist() == [0, 1, 2, 3, 4]
            server.stop()
            await serving

    asyncio.run(ask())


def test_a_name_can_be_registered_once(address: str) -> None:
    """The second handler of a name is a LocalProtocolError, by decorator too."""
    with Server(address) as server:
        server.register("echo", echo)
        with pytest.raises(LocalProtocolError, match="'echo' is already registered"):
            server.register("echo", echo)
        with pytest.raises(LocalProtocolError):
            server.method(echo)


def test_the_decorator_registers_and_returns_the_function(serve: Serve, address: str, channel: ChannelKind) -> None:
    """``@server.method`` leaves the function usable as it is."""
    server = serve()

    @server.method
    def add(a: int, b: int) -> int:
        return a + b

    assert add(1, 2) == 3
    with Client(address, channel=channel) as client:
        assert client.call("add", 1, 2) == 3


def test_empty_outside_of_a_handler_is_a_local_error(serve: Serve, address: str, channel: ChannelKind) -> None:
    """There is no caller whose arena it could use; the same for connection_id. Also after a handler has run."""
    server = serve(echo=echo)
    with Client(address, channel=channel) as client:
        client.call("echo")
        with pytest.raises(LocalProtocolError, match="inside a handler"):
            server.empty((1,), torch.uint8)
        with pytest.raises(LocalProtocolError, match="inside a handler"):
            _ = server.connection_id


def test_each_connection_has_a_number_of_its_own_and_its_end_is_told_once(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """Numbers are never used again; on_disconnect hears of each once."""
    gone: list[int] = []
    server: Server
    server = serve(number=lambda: server.connection_id)
    server.on_disconnect(gone.append)
    seen = []
    for _ in range(3):
        with Client(address, channel=channel) as client, Client(address, channel=channel) as other:
            seen += [client.call("number"), other.call("number")]
            assert client.call("number") == seen[-2]
    assert len(set(seen)) == 6
    assert eventually(lambda: len(gone) == 6)
    assert sorted(gone) == sorted(seen)


def test_a_failing_on_disconnect_callback_does_not_end_the_server(
    serve: Serve, address: str, caplog: pytest.LogCaptureFixture, channel: ChannelKind
) -> None:
    """The others are still called, and the server serves on."""
    gone: list[int] = []

    def fail(_number: int) -> None:
        raise DeliberateError("a callback failed")

    server = serve(echo=echo)
    server.on_disconnect(fail)
    server.on_disconnect(gone.append)
    Client(address, channel=channel).close()
    with Client(address, channel=channel, connect_timeout_s=2.0) as client:
        assert client.call("echo", 1) == 1
    assert eventually(lambda: len(gone) == 2)


def test_a_server_that_another_thread_has_closed_is_closed(address: str) -> None:
    """``close`` returns when the address is free again, however long the end of a connection takes."""
    server = Server(address)
    gone: list[int] = []

    def forget(connection_id: int) -> None:
        time.sleep(0.3)
        gone.append(connection_id)

    server.on_disconnect(forget)
    serving = threading.Thread(target=server.serve)
    serving.start()
    with Client(address) as client:
        client.call(ECHO)
        server.close()
        assert gone == [1]
        Server(address).close()
    serving.join(10)
    assert not serving.is_alive()


def test_a_handler_can_be_registered_by_another_name(serve: Serve, address: str) -> None:
    """``@server.method("name")``; the function itself stays as it is."""
    server = serve()

    @server.method("add.one")
    def add(number: int) -> int:
        return number + 1

    @server.method
    def twice(number: int) -> int:
        return 2 * number

    assert add(1) == 2
    with Client(address) as client:
        assert client.call("add.one", 1) == 2
        assert client.call("twice", 4) == 8
        with pytest.raises(LocalProtocolError, match=r"no method 'add'; there are: add\.one, twice"):
            client.call("add", 1)


@pytest.mark.parametrize("name", [None, 3, b"echo"])
def test_what_is_no_name_or_function_can_not_be_registered(serve: Serve, name: Any) -> None:
    """One of our errors, at once."""
    server = serve()
    with pytest.raises(LocalProtocolError, match="a str, and a function"):
        server.register(name, echo)
    with pytest.raises(LocalProtocolError, match="a str, and a function"):
        server.register("name", name)


def test_a_blocking_server_refuses_a_coroutine_function(serve: Serve) -> None:
    """It would answer with a coroutine that nothing awaits."""

    async def handler() -> None:
        raise AssertionError

    with pytest.raises(LocalProtocolError, match="use AsyncServer"):
        serve().register("name", handler)
