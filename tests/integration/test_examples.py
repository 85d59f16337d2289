"""Every example runs and prints what it demonstrates; for ``echo`` see ``test_documents``."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

import pytest

from tests.support.process import ROOT, Process

EXAMPLES = sorted(path.parent.name for path in ROOT.glob("examples/*/server.py"))
Spawn = Callable[..., Process]


def start(spawn: Spawn, example: str, address: str) -> tuple[Process, Process]:
    """Start the server and the client of an example."""
    server = spawn(ROOT / "examples" / example / "server.py", address)
    return server, spawn(ROOT / "examples" / example / "client.py", address, ready=False)


def test_pipeline_gives_the_same_results_with_all_calls_in_flight(spawn: Spawn, address: str) -> None:
    """And says how long both ways took."""
    _, client = start(spawn, "pipeline", address)
    assert client.readline() == "the same results: True"
    pattern = r"one after the other \d+\.\d{3} s, in a pipeline \d+\.\d{3} s: -?\d+% saved, 12 in flight"
    assert re.fullmatch(pattern, client.readline())
    assert client.wait() == 0


def test_several_clients_have_totals_of_their_own(spawn: Spawn, address: str) -> None:
    """Each client gets the sum of its own numbers; the server forgets the sum when the client leaves."""
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


def test_feature_service_goes_on_through_a_restart(spawn: Spawn, address: str) -> None:
    """A slow call holds up no other client; a late one is given up; all are right though it restarts."""
    server, client = start(spawn, "feature_service", address)
    assert client.readline() == "served beside a slow call: [30.0, 31.0, 32.0] | slow one done: False"
    assert client.readline() == "given up: no reply to 'features' within 0.1 s"
    assert client.readline() == "the slow one: [70.0, 71.0, 72.0]"
    assert client.readline() == "right through the restart: True"
    assert client.wait() == 0
    assert server.readline() == "generation 1 has ended"


def test_gateway_shares_out_and_streams(spawn: Spawn, address: str) -> None:
    """Both servers get as many calls; a stream that is cut short ends its generator; SIGTERM ends both servers."""
    server, client = start(spawn, "gateway", address)
    assert [client.readline() for _ in range(4)] == [
        "all right: True",
        "shared out: {'one': 5, 'two': 5}",
        "a stream: [0, 1, 2, 3, 4]",
        "cut short: [0, 1, 2]",
    ]
    assert client.wait() == 0
    lines = {server.readline() for _ in range(3)}
    assert lines == {"ready", "one: a stream has ended", "two: a stream has ended"}
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_producer_loses_nothing(spawn: Spawn, address: str) -> None:
    """Every result is right and in its order, although both arenas were full."""
    _, client = start(spawn, "producer", address)
    assert client.readline() == "100 of 100 results, in order; told in order: True"
    assert client.readline() == "waited for room: True"
    assert client.wait() == 0


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_list_of_examples_is_complete(example: str) -> None:
    """Each has a line in examples/README.md and a test here or in test_documents; a script has at most 40 lines."""
    assert f"| `{example}` |" in (ROOT / "examples/README.md").read_text()
    tests = [ROOT / "tests/integration" / name for name in ("test_examples.py", "test_documents.py")]
    assert any(
        f"def test_{example}_" in test.read_text() or f"examples/{example}/" in test.read_text() for test in tests
    )
    for script in ("server.py", "client.py"):
        assert len((ROOT / "examples" / example / script).read_text().splitlines()) <= 42
