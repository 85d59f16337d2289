"""Forks: a child can't use its parent's connection, and nothing that it does or how it ends reaches the parent's."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from shmtransport import Client
from shmtransport.message import ChannelKind
from tests.conftest import ROOT, Process

from .helpers import Spawn, start_server

pytestmark = pytest.mark.timeout(60)

FORKING_CLIENT = ROOT / "tests/scripts/forking_client.py"


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
    """A client of its own, or its parent's connected anew; the grandchild is cut off from that in turn."""
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
    """The reason that a child is given is the true one."""
    client = fork_client("fork_a_closed_one")
    assert client.readline() == "closed False"
    assert client.readline() == "0"
    assert client.wait() == 0


def test_the_end_of_a_servers_child_does_not_touch_the_server(
    spawn: Spawn, address: str, directory: Path, channel: ChannelKind
) -> None:
    """Forked in a handler, it ends with all that it has inherited: socket, clients, memory and bell stay as they were.

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
        client.call("sleep", 0.5)  # longer than a slice of waiting, after which the connection's end would be seen
        for kind in ("zmq", "doorbell"):
            with Client(address, channel=kind) as other:
                assert other.call("echo", kind) == kind
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    said = server.output.read().splitlines()  # the children may have spoken, too
    assert sorted(line for line in said if line.startswith("left")) == ["left 1", "left 2", "left 3"]
