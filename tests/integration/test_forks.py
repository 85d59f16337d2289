"""Clients, servers and replies belong to the process that made them: no use after a fork, no copy, no pickle."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shmtransport import AsyncClient, AsyncServer, Client, Closed, Server
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import Serve, Spawn, echo, start_server
from tests.support.process import ROOT, Process

pytestmark = pytest.mark.timeout(60)

FORKING_CLIENT = ROOT / "tests/support/processes/forking_client.py"


@pytest.fixture
def fork_client(spawn: Spawn, address: str, channel: ChannelKind) -> Spawn:
    """Start a server, and a client that forks in some way."""

    def start(what: str) -> Process:
        start_server(spawn, address)
        return spawn(FORKING_CLIENT, address, channel, what)

    return start


def test_a_childs_use_of_its_parents_client_is_closed_and_names_the_fork(fork_client: Spawn) -> None:
    """call, submit, empty and the result of a call in flight; close does nothing; the parent doesn't notice."""
    client = fork_client("use_in_child")
    for use in ("call", "submit", "empty", "empty_like", "server_pid", "result"):
        assert client.readline() == f"{use} Closed True"
    assert client.readline() == "close nothing"
    assert client.readline() == "close again nothing"
    assert client.readline() == "0", "the child's exit code"
    assert client.readline() == "16.0 1", "the parent's call in flight, and its next"
    assert client.wait() == 0


def test_what_a_child_drops_is_still_held_by_its_parent(fork_client: Spawn) -> None:
    """Results and loans that die in the child release nothing: no later call writes over them."""
    client = fork_client("drop_in_child")
    assert client.readline() == "0"
    assert client.readline() == "0 [[7.0], [8.0], [5.0]] {9.0}"
    assert client.wait() == 0


def test_a_childs_end_destroys_nothing_of_its_parents(fork_client: Spawn) -> None:
    """However it exits, with its exit handlers and collections or without: the parent's connection works."""
    client = fork_client("exit_in_every_way")
    for how, code in (
        ("exit_in_order", 0),
        ("exit_at_once", 0),
        ("exit_by_an_error", 1),
        ("exit_from_a_with_block", 0),
        ("exit_after_collecting", 0),
    ):
        assert client.readline() == f"{how} {code} 64.0 80.0"
        assert client.readline() == "48.0"
    assert client.readline() == "96.0"
    assert client.wait() == 0
    assert client.readline() == "", "nothing was said at exit"


def test_a_fork_while_other_threads_use_the_client(fork_client: Spawn) -> None:
    """The child has not got the thread that holds the lock: it does not wait for it, and the parent goes on."""
    client = fork_client("fork_while_locked")
    assert client.readline() == "call Closed True"
    assert client.readline() == "close nothing"
    assert client.readline() == "0"
    assert client.readline() == "thread 4.0"
    assert client.readline() == "1"
    assert client.wait() == 0


def test_a_child_may_connect_by_itself(fork_client: Spawn) -> None:
    """A client of its own, or its parent's reconnected; the grandchild is cut off from that in turn."""
    client = fork_client("connect_in_child")
    assert client.readline() == "its own 16.0"
    assert client.readline() == "reconnected 32.0"
    assert client.readline() == "call Closed True"
    assert client.readline() == "grandchild 0"
    assert client.readline() == "reconnected 1 32.0"
    assert client.readline() == "0 0"
    assert client.readline() == "1 48.0"
    assert client.wait() == 0


def test_a_spawned_child_makes_its_own_client(spawn: Spawn, address: str) -> None:
    """``multiprocessing`` with "spawn" works without further ado."""
    start_server(spawn, address)
    client = spawn(FORKING_CLIENT, address, "zmq", "spawn_child")
    assert client.readline() == "zmq [2.0, 2.0, 2.0, 2.0]"
    assert client.readline() == "doorbell [2.0, 2.0, 2.0, 2.0]"
    assert client.readline() == "0 1"
    assert client.wait() == 0


def test_a_client_that_was_closed_before_the_fork_says_that(fork_client: Spawn) -> None:
    """The error gives the child the true reason."""
    client = fork_client("fork_a_closed_one")
    assert client.readline() == "closed False"
    assert client.readline() == "0"
    assert client.wait() == 0


def test_the_end_of_a_servers_child_does_not_touch_the_server(
    spawn: Spawn, address: str, directory: Path, channel: ChannelKind
) -> None:
    """Forked in a handler, it ends with all that it has inherited: socket, clients and memory stay as they were.

    Not one reply is sent by it, nor anything written to an arena.
    """
    server = start_server(spawn, address, tells=True)
    with Client(address, channel=channel, timeout_s=20.0) as client:
        held = client.call("fill", 100, 7.0)
        for how in ("at once", "in order", "by an error", "by serving on"):
            assert client.call("fork", how) == 0, how
            for i in range(20):
                assert torch.equal(client.call("fill", 100, float(i)), torch.full((100,), float(i)))
            assert torch.equal(held, torch.full((100,), 7.0))
            assert (directory / "server.ipc").is_socket()
        client.call("sleep", 0.3)  # longer than a slice of waiting, after which the connection's end would be seen
        for kind in ("zmq", "doorbell"):
            with Client(address, channel=kind) as other:
                assert other.call("echo", kind) == kind
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    said = server.output.read().splitlines()  # the children may have spoken, too
    assert sorted(line for line in said if line.startswith("left")) == ["left 1", "left 2", "left 3"]


_BELONGS = "belongs to the process that made it; connect in that process"


def _spawn(thing: Any) -> None:
    multiprocessing.get_context("spawn").Process(target=print, args=(thing,)).start()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps, _spawn])
def test_neither_copy_nor_pickle_nor_spawn_takes_one_along(
    serve: Serve, address: str, channel: ChannelKind, make: Callable[[Any], Any]
) -> None:
    """Each kind of object raises one TypeError, and the object itself keeps working."""
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
    """Whatever it wrote there would land among the parent's replies."""
    server: Server
    server = serve(fork=lambda: _in_a_child(lambda: server.empty((4,), torch.float32)))
    with Client(address, channel=channel) as client:
        assert client.call("fork") == 0
