"""Each contender answers rightly in a real pair of processes, says who it is, and is caught when it doesn't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.contenders import CONTENDERS, Contender
from bench.contenders.floors import REPLY_BYTES, REQUEST_BYTES
from bench.contenders.pipe import Pipe
from bench.content import WrongAnswer
from bench.pair import measure
from bench.runner import Plan, chosen, rounds
from shmtransport import Client

SIZES = (64, 1 << 20)
REQUIRED = [kind for kind in CONTENDERS.values() if {package for _, package in kind.packages} <= {"pyzmq", "msgpack"}]


@pytest.mark.parametrize("kind", REQUIRED, ids=lambda kind: kind.name)
def test_a_contender_answers_rightly(kind: type[Contender]) -> None:
    """Every word is compared before and after, three words in between; ``measure`` raises if one is wrong."""
    found = measure(kind, "latency", SIZES, 0.01)
    assert [one.nbytes for one in found.sizes] == list(SIZES if kind.moves_tensors else SIZES[:1])
    for one in found.sizes:
        assert one.calls == len(one.samples_ns) >= 5
        assert min(one.samples_ns) > 0
        assert one.client_cpu_s > 0
        assert (one.server_cpu_s > 0) == kind.has_server


@pytest.mark.parametrize("name", ["doorbell, in place", "zmq, copy in", "pyzmq multipart, copy=False"])
def test_several_calls_may_be_under_way(name: str) -> None:
    """Each reply is checked against its own request."""
    found = measure(CONTENDERS[name], "throughput", SIZES, 0.02, idle_s=0.05)
    assert CONTENDERS[name].in_flight > 1
    assert all(one.calls >= 5 for one in found.sizes)
    assert found.idle_server_cores is not None
    assert found.idle_server_cores < 0.5


class OneWordWrong(Pipe):
    """Answers a full request with a word that nobody stamps changed."""

    name = "one word wrong"

    def receive(self) -> torch.Tensor:
        reply = super().receive()
        reply[3] += 1
        return reply


class NoAnswer(Pipe):
    """Answers with what it was sent."""

    name = "no answer"

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        ready()
        while True:
            link.send_bytes(link.recv_bytes())


class WrongFromTheSecondOn(Pipe):
    """Gives the previous reply once more: right words, but stale."""

    name = "stale"
    count = 0

    def receive(self) -> torch.Tensor:
        reply = super().receive()
        self.count += 1
        if self.count > 2:  # after the full calls
            reply[-1] = 7
        return reply


@pytest.mark.parametrize("kind", [OneWordWrong, NoAnswer, WrongFromTheSecondOn], ids=lambda kind: kind.name)
def test_a_wrong_answer_is_detected(kind: type[Contender]) -> None:
    """In a full call, or by its stamp."""
    with pytest.raises(WrongAnswer):
        measure(kind, "latency", SIZES[:1], 0.01)


def test_a_server_that_does_not_start_is_an_error() -> None:
    """Its own words stand on stderr."""
    with pytest.raises(RuntimeError, match="before it was ready"):
        measure(Unstartable, "latency", SIZES[:1], 0.01)


class Unstartable(Pipe):
    """Its server fails."""

    def serve(self, link: Any, ready: Callable[[], None]) -> None:
        raise ValueError("it can't start")


class Missing(Pipe):
    """Needs what nobody has."""

    name = "missing"
    packages = (("no_such_module", "no-such-package"),)


def test_what_is_not_installed_is_skipped_with_the_reason() -> None:
    """And nothing is run for it."""
    found = rounds([Missing], "latency", SIZES, Plan(0.01, 1))
    assert found.skipped == {"missing": "not installed: no-such-package"}
    assert not found.sizes


def test_what_fails_is_skipped_with_the_reason() -> None:
    """A size that can't be sent makes the pair fail; the others would go on."""
    kind = CONTENDERS["multiprocessing.Pipe"]
    found = rounds([kind], "latency", (60,), Plan(0.01, 2))
    assert found.skipped[kind.name].startswith("failed: ")
    assert "multiple of 8" in found.skipped[kind.name]


def test_every_contender_says_what_it_does() -> None:
    """Names are unique, and the table of docs/benchmarks.md has no empty cell."""
    for name, kind in CONTENDERS.items():
        assert kind.name == name
        assert kind.how
        assert kind.copies
        assert kind.reply


def test_contenders_are_chosen_by_parts_of_their_names() -> None:
    """A name with a comma is one name."""
    assert [kind.name for kind in chosen("zmq, copy in")] == ["zmq, copy in"]
    assert {kind.name for kind in chosen("pipe,grpc")} == {"multiprocessing.Pipe", "shared_memory + Pipe", "grpcio"}
    assert len(chosen("")) == len(CONTENDERS)
    with pytest.raises(ValueError, match="no contender"):
        chosen("nobody")


def test_the_bare_sockets_carry_as_much_as_a_call_of_ours(serve: Callable[..., Any], address: str) -> None:
    """The floor of the zmq channel is a round trip of equally many bytes."""
    serve(answer=lambda x: x)
    with Client(address) as client:
        x = client.empty((8,), torch.int64)
        for _ in range(4000):  # numbers grow with the calls
            client.call("answer", x)
        found = client.statistics()
        assert found.control_bytes_sent / found.calls == pytest.approx(REQUEST_BYTES, abs=3)
        assert found.control_bytes_received / found.calls == pytest.approx(REPLY_BYTES, abs=3)
