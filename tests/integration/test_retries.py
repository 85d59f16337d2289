"""Reconnecting after a loss: several threads together, and calls that are repeated."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest

from shmtransport import Client, Closed, ConnectRefused, PeerDied
from shmtransport.endpoints.client_connection import Connecting
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import Serve, Spawn, echo, eventually, in_thread, start_server
from tests.support.left_behind import kill

pytestmark = pytest.mark.timeout(60)


def test_threads_that_lost_one_connection_make_one_new_one(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """Each of them reconnects, as it must: only the first one connects."""
    server = start_server(spawn, address)
    with Client(address, channel=channel) as client:
        entered = threading.Barrier(9)
        wrong: list[object] = []

        def work() -> None:
            try:
                entered.wait(10.0)
                with pytest.raises(PeerDied):
                    client.call("sleep", 60.0)
                time.sleep(0.05 * (threading.get_ident() % 7))  # some come when others are done
                client.reconnect()
                if client.call("echo", 3) != 3:
                    wrong.append("a wrong result")
            except BaseException as error:  # noqa: BLE001 - told below
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        entered.wait(10.0)
        assert eventually(lambda: len(client._exchange.live().protocol) == 8)
        kill(server)
        second = start_server(spawn, address)
        for thread in threads:
            thread.join(30.0)
        assert not wrong
        assert client._exchange._generation == 2
        assert client.server_pid == second.pid
        client.reconnect()
        assert client._exchange._generation == 3, "without a loss it connects again"


def test_a_call_that_is_safe_to_repeat_is_repeated(
    spawn: Spawn, address: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as asked for, each time over a new connection; a call not marked as safe raises the error instead."""
    server = start_server(spawn, address)
    with Client(address, channel=channel) as client:
        assert client.with_options(retries=2).call("echo", 3) == 3
        kill(server)
        start_server(spawn, address)
        assert client.with_options(retries=1).call("echo", 3) == 3
        attempts: list[Callable[..., object]] = []

        def lost(*_arguments: object) -> object:
            attempts.append(lost)
            raise PeerDied("again")

        monkeypatch.setattr(client._exchange, "call", lost)
        with pytest.raises(PeerDied):
            client.with_options(retries=2).call("echo", 3)
        assert len(attempts) == 3


def test_threads_repeat_calls_through_many_restarts(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Whichever of them reconnects, and though half of that fails at first: each call has its own result."""
    server = serve(echo=echo)
    is_over = threading.Event()
    attempts = itertools.count()

    def connecting() -> Connecting:
        error = (None, PeerDied("in the handshake"), None, ConnectRefused("the server is stopping"))[next(attempts) % 4]
        if error is not None:
            raise error
        return connect_as_before()

    def ask(first: int) -> int:
        repeating = client.with_options(retries=20)
        number = first
        while not is_over.is_set():
            assert repeating.call("echo", number) == number
            number += 1
        return number - first

    with Client(address, channel=channel) as client:
        connect_as_before = client._exchange._connecting
        client._exchange._connecting = connecting
        asking = [in_thread(ask, 1_000_000 * thread) for thread in range(6)]
        for _ in range(12):
            assert eventually(lambda running=server: running.statistics().calls > 0)
            server.close()
            server = serve(echo=echo)
        is_over.set()
        assert all(one.result(30.0) > 0 for one in asking)


@pytest.mark.parametrize("is_lost", [False, True], ids=["alive", "lost before"])
def test_a_repeated_call_does_not_open_a_closed_client(
    spawn: Spawn, address: str, channel: ChannelKind, is_lost: bool
) -> None:
    """Not even one whose connection had been lost before it was closed."""
    server = start_server(spawn, address)
    client = Client(address, channel=channel)
    if is_lost:
        kill(server)
        with pytest.raises(PeerDied):
            client.call("echo")
        start_server(spawn, address)
    client.close()
    with pytest.raises(Closed):
        client.with_options(retries=3).call("echo")
    client.reconnect()
    assert client.with_options(retries=3).call("echo", 2) == 2
    client.close()


def test_a_repeated_call_waits_for_a_place_at_the_server(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Between two refusals it pauses, twice as long each time: a handful of retries lasts for as long as a restart."""
    first = serve(echo=echo, options={"max_clients": 1})
    with Client(address, channel=channel) as client:
        first.close()
        serve(echo=echo, options={"max_clients": 1})
        with Client(address, channel=channel) as other:
            with pytest.raises((PeerDied, Closed, ConnectRefused)):
                client.with_options(retries=1).call("echo", 1)
            asking = in_thread(client.with_options(retries=6).call, "echo", 2)
            time.sleep(0.3)
            assert not asking.done()
            other.close()
            assert asking.result(30.0) == 2
