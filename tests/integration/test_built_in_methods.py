"""What every server answers without a handler of its own: ping, health and the list of its methods."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest

from shmtransport import AsyncClient, Client
from shmtransport.core import CORE
from shmtransport.protocol.messages import ChannelKind
from shmtransport.version import VERSION
from tests.support.helpers import Serve, echo

pytestmark = pytest.mark.timeout(60)


def test_a_client_asks_what_there_is_and_how_it_is(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Methods are named in order; health counts the asking call among those that came before it not at all."""
    server = serve(echo=echo, another=echo)
    with Client(address, channel=channel) as client, Client(address):
        assert client.methods() == server.methods() == ["another", "echo"]
        client.call("echo", 1)
        with pytest.raises(Exception, match="there is no method"):
            client.call("missing")
        health = client.health()
        assert {**health, "uptime_s": None} == {
            "pid": os.getpid(),
            "version": VERSION,
            "core": CORE,
            "clients": 2,
            "calls": 3,
            "failures": 1,
            "device": "no GPU",
            "uptime_s": None,
        }
        assert client.health()["uptime_s"] > health["uptime_s"] > 0
        assert 0 < client.ping() < 60


def test_an_asyncio_client_asks_the_same(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Each is a coroutine."""
    serve(echo=echo)

    async def main() -> None:
        async with AsyncClient(address, channel=channel) as client:
            assert await client.methods() == ["echo"]
            assert (await client.health())["clients"] == 1
            assert await client.ping() > 0

    asyncio.run(main())


def test_representations_tell_address_core_and_state(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Of a server and a client, connected and closed."""
    server = serve(echo=echo)
    with Client(address, channel=channel) as client:
        client.ping()
        assert repr(server) == f"<Server at {address}, {CORE} core: 1 clients, 1 calls>"
        assert repr(client).startswith(f"<Client of {address}, {channel} channel, {CORE} core: connected to process")
    assert "ended (this client was closed)" in repr(client)


def test_an_array_is_writable_if_it_is_a_snapshot(serve: Serve, address: str, channel: ChannelKind) -> None:
    """A borrowed one is the server's memory, and can't be written."""
    serve(echo=echo)
    with Client(address, channel=channel) as borrows, Client(address, channel=channel, snapshot=True) as copies:
        assert not borrows.call("echo", np.arange(3)).flags.writeable
        array = copies.call("echo", {"x": [np.arange(3)]})["x"][0]
        array[0] = 9
        assert array.tolist() == [9, 1, 2]
