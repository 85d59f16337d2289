"""Clients, servers and replies belong to the process that made them: no copy, no pickle, no use after a fork."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shmtransport import AsyncClient, AsyncServer, Client, Closed, Server
from shmtransport.message import ChannelKind

from .helpers import Serve, echo

_BELONGS = "belongs to the process that made it; connect in that process"


def _spawn(thing: Any) -> None:
    multiprocessing.get_context("spawn").Process(target=print, args=(thing,)).start()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps, _spawn])
def test_neither_copy_nor_pickle_nor_spawn_takes_one_along(
    serve: Serve, address: str, channel: ChannelKind, make: Callable[[Any], Any]
) -> None:
    """One TypeError for each kind of object, and what it is goes on working."""
    server = serve(echo=echo)
    with Client(address, channel=channel) as client:
        pending = client.submit("echo", 1)
        for thing in (client, server, pending, AsyncClient(address)):
            with pytest.raises(TypeError, match=_BELONGS):
                make(thing)
        assert pending.result() == 1
        assert client.call("echo", 2) == 2


def test_an_asyncio_server_is_not_copied_either(address: str) -> None:
    """As the blocking one."""

    async def main() -> None:
        async with AsyncServer(address) as server:
            for make in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match=_BELONGS):
                    make(server)

    asyncio.run(main())


def _in_a_child(work: Callable[[], None]) -> int:
    """Do something in a forked child; 0 if it raised ``Closed`` that names the fork."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except Closed as error:
            os._exit(0 if "forked" in str(error) else 2)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_serving_after_a_fork_is_closed_and_names_the_fork(address: str) -> None:
    """serve() of either kind, rather than an end without a word; the parent's server still serves."""
    with Server(address) as server:
        assert _in_a_child(server.serve) == 0

    async def main() -> None:
        async with AsyncServer(address) as other:
            assert _in_a_child(lambda: other.serve().send(None)) == 0

    asyncio.run(main())


def test_serving_after_closing_is_closed(address: str) -> None:
    """The reason is the true one."""
    server = Server(address)
    server.close()
    with pytest.raises(Closed, match="this server was closed"):
        server.serve()

    async def main() -> None:
        other = AsyncServer(address)
        await other.close()
        with pytest.raises(Closed, match="this server was closed"):
            await other.serve()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_in_a_handler_gets_no_room_in_the_parents_arena(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """What it wrote there would be the parent's replies."""
    server: Server
    server = serve(fork=lambda: _in_a_child(lambda: server.empty((4,), torch.float32)))
    with Client(address, channel=channel) as client:
        assert client.call("fork") == 0
