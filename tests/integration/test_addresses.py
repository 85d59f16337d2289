"""Addresses: without a server, with one, after a killed one, and those that a server never listens on."""

from __future__ import annotations

import inspect
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_split import SplitLlamaForCausalLM
from shmtransport import AddressError, AsyncClient, Client, ConnectTimeout, Server
from tests.support.helpers import Serve, echo


def test_nobody_at_the_address_is_a_timeout_that_names_it_and_a_remedy(address: str) -> None:
    """The wait is bounded, also where a dead server has left its socket file."""
    with pytest.raises(ConnectTimeout, match=r"server\.ipc within 0\.2 s \(there is no file .*\): start one") as caught:
        Client(address, connect_timeout_s=0.2)
    assert address in str(caught.value)
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("made", [Client, AsyncClient, SplitLlamaForCausalLM.from_pretrained])
def test_by_default_a_client_waits_for_a_server_that_still_imports_torch(made: Callable[..., object]) -> None:
    """A script may start both at once: importing torch and transformers takes up to 15 s on a small machine."""
    assert inspect.signature(made).parameters["connect_timeout_s"].default >= 30.0


def test_a_second_server_at_the_address_is_refused_and_the_first_undisturbed(serve: Serve, address: str) -> None:
    """AddressError names the address; the living server keeps its socket."""
    serve(echo=echo)
    with Client(address) as client:
        with pytest.raises(AddressError, match="another server is already listening"):
            Server(address)
        assert client.call("echo", 1) == 1
        with Client(address) as late:
            assert late.call("echo", 2) == 2


def test_a_dead_servers_socket_file_is_replaced(serve: Serve, address: str, directory: Path) -> None:
    """What a killed server left behind doesn't keep a new one from starting."""
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(f"{directory}/server.ipc")
    dead.close()
    assert (directory / "server.ipc").is_socket()
    serve(echo=echo)
    with Client(address) as client:
        assert client.call("echo", 1) == 1


def test_a_file_that_is_no_socket_is_never_removed(address: str, directory: Path) -> None:
    """A mistyped address never deletes a file."""
    (directory / "server.ipc").write_text("precious")
    with pytest.raises(AddressError, match="no socket"):
        Server(address)
    assert (directory / "server.ipc").read_text() == "precious"


def test_the_socket_is_its_owners_alone_and_goes_with_the_server(address: str, directory: Path) -> None:
    """The socket's mode is 0600 while the server runs; an orderly stop removes it."""
    with Server(address):
        assert stat.S_IMODE((directory / "server.ipc").stat().st_mode) == 0o600
    assert not (directory / "server.ipc").exists()


@pytest.mark.parametrize(
    "bad",
    [
        "tcp://*:5555",
        "tcp://0.0.0.0:5555",
        "tcp://[::]:5555",
        "tcp://192.0.2.1:5555",
        "ipc://relative/path",
        "ipc:///tmp/" + "x" * 200,
        "ipc:///no/such/directory/server.ipc",
        "inproc://x",
        "/tmp/worker.ipc",
        "",
    ],
)
def test_an_address_that_is_unsafe_or_malformed_is_refused(bad: str) -> None:
    """A server never listens on all interfaces, nor anywhere it wasn't told."""
    with pytest.raises(AddressError):
        Server(bad)


def test_tcp_on_the_loopback_works_and_says_so(serve: Serve) -> None:
    """The transport that is really used is known on both sides: "tcp", not "ipc"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with Server(address) as server:
        server.register("echo", echo)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            with Client(address) as client:
                assert client.call("echo", torch.ones(2)).tolist() == [1, 1]
                assert client.scheme == server.scheme == "tcp"
        finally:
            server.stop()
            thread.join()
