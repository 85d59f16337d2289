"""Every example runs, and prints what it is there to show; for ``echo`` see ``test_documents``."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.conftest import ROOT, Process

EXAMPLES = sorted(path.parent.name for path in ROOT.glob("examples/*/server.py"))
Spawn = Callable[..., Process]


def start(spawn: Spawn, example: str, address: str) -> tuple[Process, Process]:
    """Server and client of an example."""
    server = spawn(ROOT / "examples" / example / "server.py", address)
    return server, spawn(ROOT / "examples" / example / "client.py", address, ready=False)


def test_pipeline_gives_the_same_results_with_all_calls_in_flight(spawn: Spawn, address: str) -> None:
    """And says how long both ways took."""
    _, client = start(spawn, "pipeline", address)
    assert client.readline() == "the same results: True"
    pattern = r"one after the other \d\.\d{3} s, in a pipeline \d\.\d{3} s: -?\d+% saved, 12 in flight"
    assert re.fullmatch(pattern, client.readline())
    assert client.wait() == 0


def test_several_clients_have_totals_of_their_own(spawn: Spawn, address: str) -> None:
    """Each what it has added, at the end of each the server forgets it."""
    server, client = start(spawn, "several_clients", address)
    assert [client.readline() for _ in range(3)] == [f"client {i} has a total of {10 * i}" for i in range(3)]
    left = [server.readline() for _ in range(3)]
    assert sorted(left) == [f"a client has left with a total of {10 * i}" for i in range(3)]
    assert client.wait() == 0


def test_in_place_copies_nothing(spawn: Spawn, address: str) -> None:
    """Neither side, in a hundred calls of 8 MiB each way."""
    _, client = start(spawn, "in_place", address)
    assert client.readline() == "sent and received 1600 MiB"
    assert client.readline() == "copied 0 bytes here, 0 at the server"
    assert re.fullmatch(r"\d+\.\d{3} ms a call \(median\)", client.readline())
    assert client.wait() == 0


def test_trusted_snapshot_uses_what_it_has_checked(spawn: Spawn, address: str) -> None:
    """The view has changed after the check, the private copy has not."""
    _, client = start(spawn, "trusted_snapshot", address)
    assert client.readline().startswith("a borrowed view: the check was in vain: index 1000000 is out of bounds")
    assert client.readline() == "a private copy: used rows [1, 0] -> [10.0, 0.0]"
    assert client.wait() == 0


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_list_of_examples_is_complete(example: str) -> None:
    """A line in examples/README.md, a test here or in test_documents, no more than 40 lines a script."""
    assert f"| `{example}` |" in (ROOT / "examples/README.md").read_text()
    tests = [ROOT / "tests/integration" / name for name in ("test_examples.py", "test_documents.py")]
    assert any(
        f"def test_{example}_" in test.read_text() or f"examples/{example}/" in test.read_text() for test in tests
    )
    for script in ("server.py", "client.py"):
        assert len((ROOT / "examples" / example / script).read_text().splitlines()) <= 42
