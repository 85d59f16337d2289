"""What ``shmtransport ls`` tells of connections: client, server, size and address, as far as the system knows them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shmtransport import Client
from shmtransport.diagnostics import cli
from shmtransport.diagnostics.connections import Connections, connections, listening_addresses
from tests.support.helpers import MIB, Serve, echo, eventually
from tests.support.process import ROOT, Process

Spawn = Callable[..., Process]
SERVER = ROOT / "tests/support/processes/server.py"
CLIENT = ROOT / "tests/support/processes/client.py"


def of(*processes: int, address: str = "") -> Connections:
    """The connections between these processes, at this address if there may be others."""
    among = [one for one in connections() if one.processes == tuple(sorted(processes))]
    (found,) = [one for one in among if not address or address in one.addresses]
    return found


def test_a_connection_is_listed_with_both_processes_size_and_address(spawn: Spawn, address: str) -> None:
    """Client and server are told apart; a second connection between the same two counts."""
    server = spawn(SERVER, address)
    client = spawn(CLIENT, address, "zmq", "idle", str(MIB))
    one = of(client.pid, server.pid)
    assert (one.client_pid, one.server_pid, one.count) == (client.pid, server.pid, 1)
    assert one.addresses == (address,)
    assert 2 * MIB <= one.nbytes < 3 * MIB
    table = " ".join(CliRunner().invoke(cli.app, ["ls"]).stdout.split())
    assert f"process {client.pid} │ process {server.pid} │ 1 │" in table
    listed = json.loads(CliRunner().invoke(cli.app, ["ls", "--json"]).stdout)["connections"]
    assert next(row for row in listed if row["server_pid"] == server.pid)["addresses"] == [address]
    with Client(address, arena_bytes=MIB), Client(address, arena_bytes=MIB):
        two = of(os.getpid(), server.pid)
    assert (two.count, two.nbytes) == (2, 2 * one.nbytes)
    client.end()
    assert eventually(lambda: not [found for found in connections() if server.pid in found.processes])


def test_client_and_server_in_one_process(serve: Serve, address: str) -> None:
    """Each segment is mapped twice, and counts once."""
    serve(echo=echo)
    with Client(address, arena_bytes=MIB):
        one = of(os.getpid(), address=address)
        with Client(address, arena_bytes=MIB):
            two = of(os.getpid(), address=address)
    assert (one.client_pid, one.server_pid) == (os.getpid(), os.getpid())
    assert address in one.addresses
    assert two.count - one.count == 1
    assert 2 * MIB <= two.nbytes - one.nbytes < 3 * MIB


def test_where_both_processes_listen_neither_is_called_the_server(spawn: Spawn, address: str, directory: Path) -> None:
    """A gateway listens too: the system does not tell which of the two serves the other."""
    server = spawn(SERVER, address)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(directory / "gate way"))
        other.listen()
        assert f"ipc://{directory}/gate way" in listening_addresses(os.getpid())
        with Client(address, arena_bytes=MIB):
            one = of(os.getpid(), server.pid)
            table = " ".join(CliRunner().invoke(cli.app, ["ls"]).stdout.split())
    assert (one.client_pid, one.server_pid, one.addresses) == (None, None, ())
    assert "unknown (" in table


def test_several_addresses_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of them may be the one; brackets are no markup."""
    found = Connections((3, 7), 3, 7, 1, MIB, ("ipc:///a", "tcp://[::1]:5"))
    monkeypatch.setattr(cli, "connections", lambda: [found])
    assert "one of ipc:///a, tcp://[::1]:5" in CliRunner().invoke(cli.app, ["ls"], env={"COLUMNS": "200"}).stdout


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_tcp_addresses_are_found(family: socket.AddressFamily, host: str) -> None:
    """As they are written in an address."""
    with socket.socket(family) as listening:
        try:
            listening.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        before = set(listening_addresses(os.getpid()))  # other tests' servers, perhaps
        listening.listen()
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        assert set(listening_addresses(os.getpid())) - before == {f"tcp://{shown}:{port}"}


def test_a_process_that_can_not_be_seen_listens_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has ended; nor one whose network's tables are missing."""
    assert listening_addresses(2**22 + 1) == ()
    real: Any = open

    def without_tables(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if "/net/" in str(path):
            raise FileNotFoundError(2, "No such file")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", without_tables)
    assert listening_addresses(os.getpid()) == ()
