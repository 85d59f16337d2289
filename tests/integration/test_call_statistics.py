"""What both sides count of their calls."""

from __future__ import annotations

import pytest
import torch

from shmtransport import Client, RemoteError, Server
from shmtransport.message import ChannelKind

from .helpers import MIB, Serve


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
    with Client(shared_server, channel=channel) as client:
        client.call("double", torch.zeros(1))
        small = client.statistics().control_bytes_sent
        client.call("double", torch.zeros(4 * MIB))
        assert client.statistics().control_bytes_sent - small < small + 32
