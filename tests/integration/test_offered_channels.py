"""A server chooses which channels its clients may use."""

from __future__ import annotations

import asyncio
import os

import pytest

from shmtransport import AsyncServer, Client, ConnectRefused, Server
from shmtransport.message import CHANNEL_KINDS, ChannelKind

from .helpers import Serve, echo


def _bells() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"sem.shmtransport-bell-{os.getpid()}-")]


@pytest.mark.parametrize("offered", CHANNEL_KINDS)
@pytest.mark.parametrize("asked", CHANNEL_KINDS)
def test_a_channel_that_is_not_offered_is_refused_by_name(
    serve: Serve, address: str, offered: ChannelKind, asked: ChannelKind
) -> None:
    """Both are named; nothing was made for the refused client, and the next one is served."""
    serve({"channels": (offered,)}, echo=echo)
    if asked == offered:
        with Client(address, channel=asked) as client:
            assert client.call("echo", 1) == 1
        return
    with pytest.raises(
        ConnectRefused, match=f"channel {asked} was asked for; its channels are {offered}: use {offered}"
    ):
        Client(address, channel=asked)
    assert not _bells()
    with Client(address, channel=offered) as client:
        assert client.call("echo", 1) == 1


def test_an_asyncio_server_chooses_too(address: str) -> None:
    """The same option, the same words."""

    async def main() -> None:
        async with AsyncServer(address, channels=["zmq"]) as server:
            serving = asyncio.create_task(server.serve())
            with pytest.raises(ConnectRefused, match="channel doorbell was asked for; its channels are zmq"):
                await asyncio.to_thread(Client, address, channel="doorbell")
            server.stop()
            await serving

    asyncio.run(main())


def test_both_are_offered_by_default(serve: Serve, address: str, channel: ChannelKind) -> None:
    """As before; in any order, and named twice as well."""
    serve({"channels": ["doorbell", "zmq", "zmq"]}, echo=echo)
    with Client(address, channel=channel) as client:
        assert client.call("echo", 1) == 1
    assert Server.__init__.__kwdefaults__["channels"] == CHANNEL_KINDS
