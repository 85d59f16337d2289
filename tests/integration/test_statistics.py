"""What both sides count of their calls; counters never decrease, whatever is refused or fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from shmtransport import Client, RemoteError, Server, Statistics, TransportError
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import KIB, MIB, DeliberateError, Serve


def test_statistics_count_calls_and_bytes_on_both_sides(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Calls, failures, tensor bytes, copies and control bytes; what one side sends the other receives."""
    server: Server

    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 2, out=server.empty(x.shape, x.dtype))

    server = serve(double=double)
    with Client(address, channel=channel) as client:
        for _ in range(10):
            client.call("double", torch.ones(100))
        loan = client.empty((50,), torch.float64).fill_(0)
        client.call("double", loan)
        with pytest.raises(RemoteError):
            client.call("double", 1)
        mine, theirs = client.statistics(), server.statistics()
    for side in (mine, theirs):
        assert side.calls == 12
        assert side.failures == 1
        assert side.call_seconds > 0
        assert side.serialize_seconds > 0
        assert side.deserialize_seconds > 0
    assert mine.tensor_bytes_sent == theirs.tensor_bytes_received == 10 * 400 + 400
    assert mine.tensor_bytes_received == theirs.tensor_bytes_sent == 10 * 400 + 400
    assert (mine.bytes_copied, mine.tensors_copied) == (10 * 400, 10)
    assert (theirs.bytes_copied, theirs.tensors_copied) == (0, 0)
    assert 0 < mine.control_bytes_sent == theirs.control_bytes_received < 12 * 200
    assert 0 < theirs.control_bytes_sent == mine.control_bytes_received < 12 * 400


def test_statistics_are_frozen_and_print_as_a_table(shared_server: str, channel: ChannelKind) -> None:
    """A snapshot of the totals that later calls don't change, in rows with units."""
    with Client(shared_server, channel=channel) as client:
        client.call("echo", torch.zeros(MIB, dtype=torch.uint8))
        before = client.statistics()
        client.call("echo")
        assert before.calls == 1
        with pytest.raises(AttributeError):
            before.calls = 5  # type: ignore[misc]
        lines = str(before).splitlines()
        assert lines[0].split() == ["calls", "1"]
        assert any(line.split() == ["tensors", "sent", "1.0", "MiB"] for line in lines)


def test_control_messages_do_not_grow_with_the_tensor(shared_server: str, channel: ChannelKind) -> None:
    """A few hundred bytes a call, whether a tensor has 4 bytes or 16 MiB."""
    with Client(shared_server, channel=channel, arena_bytes=32 * MIB) as client:
        client.call("double", torch.zeros(1))
        small = client.statistics().control_bytes_sent
        client.call("double", torch.zeros(4 * MIB))
        assert client.statistics().control_bytes_sent - small < small + 32


_TOTALS = [field.name for field in fields(Statistics) if field.name != "latency_histogram"] + ["copies_avoided"]


def _fail() -> None:
    raise DeliberateError


_REFUSED: dict[str, Callable[[Client], Any]] = {
    "too many tensors": lambda client: client.call("take", [torch.ones(4)] * 1025),
    "a later tensor too large": lambda client: client.call("take", torch.ones(4), torch.ones(64 * KIB)),
    "no room for a later tensor": lambda client: client.with_options(timeout_s=0.1).call(
        "take", *[torch.ones(3 * KIB)] * 8
    ),
    "values too large": lambda client: client.call("take", torch.ones(4), "x" * 100_000),
    "a value of another type": lambda client: client.call("take", torch.ones(4), object()),
    "a loan with a value of another type": lambda client: client.call(
        "take", client.empty((4,), torch.float32), object()
    ),
    "an integer too large": lambda client: client.call("take", torch.ones(4), 2**64),
    "a bad shape": lambda client: client.empty((3.0,), torch.float32),  # type: ignore[arg-type]
    "a method without a name": lambda client: client.call(3, torch.ones(4)),  # type: ignore[arg-type]
    "no such method": lambda client: client.call("nothing", torch.ones(4)),
    "a handler that fails": lambda client: client.call("fail"),
    "a result too large": lambda client: client.call("give", [torch.ones(4), torch.ones(64 * KIB)]),
    "a result of another type": lambda client: client.call("odd"),
    "a reply that comes too late": lambda client: client.submit("take", torch.ones(4)).result(0.0),
}


def _all_at_least(now: Statistics, before: Statistics) -> bool:
    return all(getattr(now, name) >= getattr(before, name) >= 0 for name in _TOTALS)


@pytest.mark.parametrize("what", _REFUSED)
def test_counters_only_grow(serve: Serve, address: str, channel: ChannelKind, what: str) -> None:
    """On both sides, in every total: each is at least what it was, and a refused message counts nothing at all."""
    server = serve(
        take=lambda *_: None,
        fail=_fail,
        give=lambda tensors: [torch.ones(4), torch.ones(64 * KIB)],
        odd=lambda: [torch.ones(4), object()],
    )
    with Client(address, channel=channel, arena_bytes=64 * KIB) as client:
        client.call("take", torch.ones(4), client.empty((4,), torch.float32).fill_(1.0))
        for _ in range(3):
            mine, theirs = client.statistics(), server.statistics()
            with contextlib.suppress(TransportError):
                _REFUSED[what](client)
            client.call("take")
            now = client.statistics()
            assert _all_at_least(now, mine)
            assert _all_at_least(server.statistics(), theirs)
            assert now.tensors_sent - mine.tensors_sent == (now.tensors_copied - mine.tensors_copied)
            assert server.statistics().tensors_copied == server.statistics().tensors_sent == 0
            assert now.failures <= now.calls
            assert server.statistics().failures <= server.statistics().calls
