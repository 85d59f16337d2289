"""The interfaces of client and server beside calls: ends, registration, connections."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
import torch

from shmtransport import Client, Closed, LocalProtocolError, Server
from shmtransport.message import ChannelKind

from .helpers import MIB, DeliberateError, Serve, echo, eventually

# The end of a client


def test_after_close_every_use_raises_closed(shared_server: str, channel: ChannelKind) -> None:
    """call, submit and empty say Closed; a second close does nothing."""
    client = Client(shared_server, channel=channel)
    client.call("echo", 1)
    client.close()
    client.close()
    for use in (
        lambda: client.call("echo", 1),
        lambda: client.submit("echo"),
        lambda: client.empty((1,), torch.uint8),
        lambda: client.server_pid,
    ):
        with pytest.raises(Closed):
            use()
    assert client.statistics().calls == 1


def test_calls_in_flight_fail_with_closed(shared_server: str, channel: ChannelKind) -> None:
    """A pending reply of a closed client raises at once."""
    client = Client(shared_server, channel=channel)
    pending = client.submit("sleep", 0.2)
    client.close()
    assert pending.done
    with pytest.raises(Closed):
        pending.result()


def test_results_and_loans_stay_valid_after_close(shared_server: str, channel: ChannelKind) -> None:
    """Tensors keep the memory they look into; dropping them then is safe too."""
    with Client(shared_server, channel=channel, arena_bytes=MIB) as client:
        result = client.call("fill", 1000, 3.0)
        array = client.call("echo", np.arange(10))
        loan = client.empty((1000,), torch.float32).fill_(4)
    del client
    gc.collect()
    with Client(shared_server, channel=channel, arena_bytes=MIB) as other:
        other.call("fill", 1000, 5.0)
    assert torch.equal(result, torch.full((1000,), 3.0))
    assert array.tolist() == list(range(10))
    assert torch.equal(loan, torch.full((1000,), 4.0))
    result += 1  # it is ordinary memory
    del result, array, loan
    gc.collect()


def test_the_context_manager_closes_also_on_an_error(shared_server: str, channel: ChannelKind) -> None:
    """The error itself passes through."""
    with pytest.raises(ZeroDivisionError), Client(shared_server, channel=channel) as client:
        _ = 1 / 0
    with pytest.raises(Closed):
        client.call("echo")


def test_a_client_can_connect_again_and_again(shared_server: str, channel: ChannelKind) -> None:
    """50 connections in turn leave nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        with Client(shared_server, channel=channel, arena_bytes=4096) as client:
            assert client.call("echo", i) == i
    del client
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# The server's interface


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
