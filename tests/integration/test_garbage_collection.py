"""Dropping an object without closing it never blocks, frees everything, and raises a ResourceWarning."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shmtransport import AsyncClient, AsyncServer, Client, PeerDied, Server
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import KIB, Serve, Spawn, echo, eventually, in_thread, start_server
from tests.support.process import Process

pytestmark = pytest.mark.timeout(30)


class Cycle:
    """Holds something, and itself: only the garbage collection ends it."""

    def __init__(self, thing: object) -> None:
        self.thing = thing
        self.me = self


@contextlib.contextmanager
def warned(times: int = 1) -> Iterator[None]:
    """Within the block this number of things is dropped, each with a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        assert eventually(lambda: len(caught) >= times)
    texts = [str(one.message) for one in caught if one.category is ResourceWarning]
    assert len(texts) == times
    assert all("was dropped without being closed" in text for text in texts)


def held() -> tuple[int, int, int]:
    """How many descriptors, threads and mapped segments this process has."""
    with open("/proc/self/maps") as maps:
        mapped = sum("/dev/shm/shmtransport-" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped


@pytest.mark.parametrize("by", ["its last reference", "a collection", "a collection of another thread"])
@pytest.mark.parametrize("unfinished", [False, True])
def test_a_dropped_client_gives_its_place_back(
    spawn: Spawn, address: str, channel: ChannelKind, by: str, unfinished: bool
) -> None:
    """With or without a call in flight; its room is free here and at the server, and its results stay readable."""
    start_server(spawn, address, max_clients=1)
    before = held()

    def use() -> Any:
        client = Client(address, channel=channel, arena_bytes=64 * KIB)
        result = client.call("double", torch.ones(5))
        if unfinished:
            client.submit("echo", 1)
        return result, client if by == "its last reference" else Cycle(client)

    for _ in range(3):  # each needs the place of the one before
        with warned():
            result, thing = use()
            del thing
            if by == "a collection of another thread":
                in_thread(gc.collect).result(10.0)
            elif by == "a collection" or unfinished:  # a call in flight and its client refer to each other
                gc.collect()
        assert torch.equal(result, torch.full((5,), 2.0))
    with Client(address, channel=channel) as after:
        assert after.call("echo", 2) == 2
    del result, after
    gc.collect()
    assert eventually(lambda: held() == before), f"{held()} was {before}"


def test_an_exception_before_the_with_block_drops_the_client(serve: Serve, address: str, channel: ChannelKind) -> None:
    """The traceback holds it for as long as it is kept; then its place is free."""
    serve({"max_clients": 1}, echo=echo)

    def fail() -> None:
        client = Client(address, channel=channel, arena_bytes=64 * KIB)
        raise ValueError(client.call("echo", "before the block"))

    with pytest.raises(ValueError, match="before the block") as caught:
        fail()
    with warned():
        del caught
        gc.collect()
    with Client(address, channel=channel) as after:
        assert after.call("echo", 2) == 2


@pytest.mark.parametrize("closed_loop", [False, True])
@pytest.mark.parametrize("cyclic", [False, True])
def test_a_dropped_asyncio_client_gives_its_place_back(
    spawn: Spawn, address: str, channel: ChannelKind, cyclic: bool, closed_loop: bool
) -> None:
    """While its loop runs, and after; the loop's readers never keep it alive."""
    start_server(spawn, address, max_clients=1)

    async def use() -> Any:
        client = await AsyncClient(address, channel=channel, arena_bytes=64 * KIB).connect()
        assert await client.call("echo", 1) == 1
        return Cycle(client) if cyclic else client

    async def main() -> Any:
        thing = await use()
        if closed_loop:
            return thing
        del thing
        gc.collect()
        await asyncio.sleep(0.05)  # the loop removes its readers first
        async with AsyncClient(address, channel=channel, arena_bytes=64 * KIB) as after:
            assert await after.call("echo", 2) == 2
        return None

    with warned():
        thing = asyncio.run(main())
        del thing
        gc.collect()
    with Client(address, channel=channel) as after:
        assert after.call("echo", 3) == 3


@pytest.mark.parametrize("kind", [Server, AsyncServer])
@pytest.mark.parametrize("cyclic", [False, True])
def test_a_dropped_server_that_never_served_leaves_nothing(
    kind: Callable[..., Any], address: str, cyclic: bool
) -> None:
    """Neither its socket file, nor a thread or descriptor; another server can have the address at once."""
    before = held()
    with warned():
        thing = Cycle(kind(address)) if cyclic else kind(address)
        del thing
        gc.collect()
    assert not os.path.exists(address.removeprefix("ipc://"))
    with Server(address):
        pass
    assert eventually(lambda: held() == before), f"{held()} was {before}"


def test_clients_of_a_dropped_server_learn_of_its_end(address: str, channel: ChannelKind) -> None:
    """It served, was stopped, and then its last reference went away."""
    server = Server(address)
    server.register("echo", echo)
    thread = threading.Thread(target=server.serve)
    thread.start()
    client = Client(address, channel=channel, arena_bytes=64 * KIB)
    assert client.call("echo", 1) == 1
    server.stop()
    thread.join()
    with warned():
        del server, thread
        gc.collect()
    with pytest.raises(PeerDied):
        client.call("echo", 2)
    client.close()


_ENDING = """
import sys, threading
from shmtransport import Client, Server
server = Server(sys.argv[1])
server.register("echo", lambda x: x)
threading.Thread(target=server.serve, daemon=True).start()
client = Client(sys.argv[1], channel=sys.argv[2])
assert client.call("echo", 1) == 1
pending = client.submit("echo", 2)
"""


def test_a_process_ends_with_what_it_has_not_closed(address: str, channel: ChannelKind) -> None:
    """A server that a daemon thread serves, a client and a call: exit code 0, and no name is left."""
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", _ENDING, address, channel]
    done = subprocess.run(command, env=Process.environment(), capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(address.removeprefix("ipc://"))
    assert set(os.listdir("/dev/shm")) <= before  # what others have left may go


def test_a_forked_child_that_collects_garbage_leaves_the_parents_alone(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """A client in a cycle that the parent has dropped and not yet collected, and one that it still uses."""
    start_server(spawn, address)
    client = Client(address, channel=channel, arena_bytes=64 * KIB)
    result = client.call("double", torch.ones(5))
    gc.disable()
    try:
        Cycle(Client(address, channel=channel, arena_bytes=64 * KIB))
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        gc.enable()
    assert client.call("echo", 1) == 1
    assert torch.equal(result, torch.full((5,), 2.0))
    with warned():
        gc.collect()
    client.close()
