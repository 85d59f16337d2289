"""Each contender answers correctly in a real pair of processes; one that answers wrongly is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.contenders import CONTENDERS, Contender, choose
from bench.contenders.floors import REPLY_BYTES, REQUEST_BYTES
from bench.contenders.pipe import Pipe
from bench.harness.content import WrongAnswer
from bench.harness.pair import measure
from bench.harness.runner import Plan, run_rounds
from shmtransport import Client

pytestmark = pytest.mark.usefixtures("quick_processes")

SIZES = (64, 1 << 20)
REQUIRED = [one for one in CONTENDERS.values() if {package for _, package in one.packages} <= {"pyzmq", "msgpack"}]


@pytest.mark.parametrize("contender", REQUIRED, ids=lambda one: one.name)
def test_a_contender_answers_correctly(contender: type[Contender]) -> None:
    """Every word is compared before and after, three words in between; ``measure`` raises if one is wrong."""
    found = measure(contender, "latency", SIZES, 0.03)  # several ticks: the kernel accounts CPU time by them
    assert [one.nbytes for one in found.sizes] == list(SIZES if contender.moves_tensors else SIZES[:1])
    for one in found.sizes:
        assert one.calls == len(one.samples_ns) >= 5
        assert min(one.samples_ns) > 0
        assert one.client_cpu_s > 0
        assert (one.server_cpu_s > 0) == contender.has_server


@pytest.mark.parametrize("name", ["doorbell, in place", "zmq, copy in", "pyzmq multipart, copy=False"])
def test_several_calls_may_be_in_flight(name: str) -> None:
    """Each reply is checked against its own request."""
    found = measure(CONTENDERS[name], "throughput", SIZES, 0.02, idle_s=0.05)
    assert CONTENDERS[name].in_flight > 1
    assert all(one.calls >= 5 for one in found.sizes)
    assert found.idle_server_cores is not None
    assert found.idle_server_cores < 0.5


class OneWordWrong(Pipe):
    """Answers a full request with a changed word that no stamp covers."""

    name = "one word wrong"

    def receive(self) -> torch.Tensor:
        reply = super().receive()
        reply[3] += 1
        return reply


class NoAnswer(Pipe):
    """Answers with what it was sent."""

    name = "no answer"

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        ready()
        while True:
            endpoint.send_bytes(endpoint.recv_bytes())


class WrongFromTheSecondOn(Pipe):
    """Answers stamped calls with a stale last word."""

    name = "stale"
    count = 0

    def receive(self) -> torch.Tensor:
        reply = super().receive()
        self.count += 1
        if self.count > 2:  # after the full calls
            reply[-1] = 7
        return reply


@pytest.mark.parametrize("contender", [OneWordWrong, NoAnswer, WrongFromTheSecondOn], ids=lambda one: one.name)
def test_a_wrong_answer_is_detected(contender: type[Contender]) -> None:
    """In a full call, or by its stamp."""
    with pytest.raises(WrongAnswer):
        measure(contender, "latency", SIZES[:1], 0.01)


def test_a_server_that_does_not_start_is_an_error() -> None:
    """Its own message is on stderr."""
    with pytest.raises(RuntimeError, match="before it was ready"):
        measure(Unstartable, "latency", SIZES[:1], 0.01)


class Unstartable(Pipe):
    """Its server fails."""

    def serve(self, endpoint: Any, ready: Callable[[], None]) -> None:
        raise ValueError("it can't start")


class Missing(Pipe):
    """Needs a package that does not exist."""

    name = "missing"
    packages = (("no_such_module", "no-such-package"),)


def test_what_is_not_installed_is_skipped_with_the_reason() -> None:
    """No process is started for it."""
    found = run_rounds([Missing], "latency", SIZES, Plan(0.01, 1))
    assert found.skipped == {"missing": "not installed: no-such-package"}
    assert not found.sizes


def test_what_fails_is_skipped_with_the_reason() -> None:
    """A size that can't be stamped makes the pair fail; other contenders would go on."""
    found = run_rounds([Pipe], "latency", (60,), Plan(0.01, 2))
    assert found.skipped[Pipe.name].startswith("failed: ")
    assert "multiple of 8" in found.skipped[Pipe.name]


def test_every_contender_describes_itself() -> None:
    """Names are unique, and the table of docs/benchmarks.md has no empty cell."""
    for name, one in CONTENDERS.items():
        assert one.name == name
        assert one.how
        assert one.copies
        assert one.reply


def test_contenders_are_chosen_by_parts_of_their_names() -> None:
    """A full name with a comma is one name."""
    assert [one.name for one in choose("zmq, copy in")] == ["zmq, copy in"]
    assert {one.name for one in choose("pipe,grpc")} == {"multiprocessing.Pipe", "shared_memory + Pipe", "grpcio"}
    assert len(choose("")) == len(CONTENDERS)
    with pytest.raises(ValueError, match="no contender"):
        choose("no such thing")


def test_the_bare_sockets_carry_as_much_as_a_call_of_ours(serve: Callable[..., Any], address: str) -> None:
    """The floor of the zmq channel is a round trip of the same number of bytes."""
    serve(answer=lambda x: x)
    with Client(address) as client:
        x = client.empty((8,), torch.int64)
        for _ in range(4000):  # the encoded numbers grow with the calls
            client.call("answer", x)
        found = client.statistics()
        assert found.control_bytes_sent / found.calls == pytest.approx(REQUEST_BYTES, abs=3)
        assert found.control_bytes_received / found.calls == pytest.approx(REPLY_BYTES, abs=3)
