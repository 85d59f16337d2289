"""Tensors that are already in an arena, and foreign ones: loans sent again and again, dlpack, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shmtransport import ArenaFull, Client, Closed, LocalProtocolError
from shmtransport.memory.dtypes import TABLE
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import KIB, MIB, Serve, Spawn, eventually, in_thread, start_server
from tests.support.process import ROOT

pytestmark = pytest.mark.timeout(60)

# Loans


@pytest.mark.parametrize("retries", [None, 0, 1])
def test_a_call_that_is_not_answered_keeps_no_argument_that_the_server_released(
    spawn: Spawn, address: str, channel: ChannelKind, retries: int | None
) -> None:
    """Nothing of the client's refers to what its caller has dropped; only a call that may be repeated needs it."""
    spawn(ROOT / "tests/support/processes/either_server.py", address, "AsyncServer")
    with Client(address, channel=channel, arena_bytes=64 * KIB) as client:
        caller = client if retries is None else client.with_options(retries=retries)
        calling = in_thread(lambda: caller.call("forget", client.empty((64 * KIB,), torch.uint8)))
        assert eventually(lambda: client.statistics().tensors_sent == 1)
        if retries:
            with pytest.raises(ArenaFull):
                client.empty((64 * KIB,), torch.uint8)
        else:
            assert eventually(lambda: has_room(client))
        assert not calling.done()
    with pytest.raises(Closed):
        calling.result(30.0)


def has_room(client: Client) -> bool:
    """Whether the whole arena could be had now."""
    try:
        client.empty((64 * KIB,), torch.uint8)
    except ArenaFull:
        return False
    return True


def test_a_loan_may_be_sent_several_times_and_in_several_calls_at_once(
    shared_server: str, channel: ChannelKind
) -> None:
    """One memory, twice in a message and in 20 messages at once: never copied, and all results are right."""
    with Client(shared_server, channel=channel, arena_bytes=64 * KIB, reply_arena_bytes=MIB) as client:
        loan = client.empty((8 * KIB,), torch.float32).copy_(torch.arange(8.0 * KIB))  # half the arena
        expected = loan.clone() * 2
        for _ in range(3):
            both = [client.submit("echo", [loan, loan[100:200], loan.view(2, -1)]), client.submit("double", loan)]
            more = [client.submit("total", loan[:10]) for _ in range(20)]
            whole, part, folded = both[0].result()
            assert torch.equal(whole, loan)
            assert torch.equal(part, loan[100:200])
            assert torch.equal(folded.view(-1), loan)
            assert torch.equal(both[1].result(), expected)
            assert [reply.result() for reply in more] == [45.0] * 20
            del both, whole, part, folded
        assert client.statistics().tensors_copied == 0
        assert client.statistics().copies_avoided == 3 * 24


def test_a_loans_memory_is_used_again_only_when_all_are_done_with_it(
    spawn: Spawn, address: str, channel: ChannelKind
) -> None:
    """Dropped here while the server still borrows it twice: nothing is written over it until both are dropped."""
    start_server(spawn, address)
    with Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=0.2) as client:
        loan = client.empty((1000,), torch.float32).fill_(7.0)
        client.call("keep", loan)
        client.call("keep", loan[500:])
        del loan
        for i in range(100):  # round the arena again and again
            client.call("total", torch.full((3 * KIB,), float(i)))
        assert client.call("look", 0) == [7.0] * 1000
        assert client.call("look", 1) == [7.0] * 500
        client.call("drop")
        whole = client.empty((64 * KIB,), torch.uint8)
        assert whole.numel() == 64 * KIB


def test_a_loan_that_is_kept_is_never_written_over(shared_server: str, channel: ChannelKind) -> None:
    """Sent, answered and released by the server: it is still its holder's, also by a view or an array of it alone."""
    with Client(shared_server, channel=channel, arena_bytes=64 * KIB) as client:
        loan = client.empty((1000,), torch.float32).fill_(7.0)
        array = client.empty((1000,), torch.float32).fill_(8.0).numpy()
        part = client.empty((1000,), torch.float32).fill_(9.0)[10:20]
        for i in range(100):
            assert client.call("total", loan) == 7000.0
            assert client.call("total", torch.full((3 * KIB,), float(i))) == 3.0 * KIB * i
        assert set(loan.tolist()) == {7.0}
        assert set(array.tolist()) == {8.0}
        assert set(part.tolist()) == {9.0}
        assert client.call("total", torch.from_numpy(array)) == 8000.0
        assert client.statistics().tensors_copied == 100


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_loan_of_every_dtype_is_sent_as_it_lies(shared_server: str, row: Any) -> None:
    """``empty`` and ``empty_like`` make tensors of each dtype whose bytes arrive uncopied, on both channels."""
    raw = torch.arange(24 * row.itemsize, dtype=torch.uint8)
    if row.name == "bool":
        raw %= 2
    for channel in ("zmq", "doorbell"):
        with Client(shared_server, channel=channel, arena_bytes=64 * KIB) as client:
            loan = client.empty((2, 3, 4), row.torch)
            like = client.empty_like(loan)
            for made in (loan, like):
                assert (made.shape, made.dtype, made.device.type) == ((2, 3, 4), row.torch, "cpu")
                made.view(-1).view(torch.uint8).copy_(raw)
                result = client.call("echo", made)
                assert result.dtype == row.torch
                assert torch.equal(result.view(-1).view(torch.uint8), raw)
            assert client.statistics().tensors_copied == 0


def test_empty_like_follows_shape_and_dtype_only(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Of strided tensors, of others' memory and of results; the same in a handler, in the reply arena."""

    def halve(x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 0.5, out=server.empty_like(x))

    server = serve(halve=halve)
    with Client(address, channel=channel) as client:
        x = torch.arange(6, dtype=torch.float16).view(2, 3).T
        loan = client.empty_like(x)
        assert (loan.shape, loan.dtype, loan.is_contiguous()) == ((3, 2), torch.float16, True)
        loan.copy_(x)
        result = client.call("halve", loan)
        assert torch.equal(result, x * 0.5)
        assert client.empty_like(result).shape == (3, 2)
        assert client.empty_like(torch.empty(0, 4)).shape == (0, 4)
        assert client.empty_like(torch.tensor(1)).shape == ()
        assert client.statistics().tensors_copied == server.statistics().tensors_copied == 0


# Tensors of other kinds


class Foreign:
    """Another library's array: torch can look into it by ``__dlpack__``, and there is nothing else to know of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


class Broken(Foreign):
    """One whose own code fails."""

    def __dlpack__(self, **_options: Any) -> Any:
        raise BufferError("it is on another planet")


def test_whatever_has_dlpack_arrives_as_a_tensor(shared_server: str, channel: ChannelKind) -> None:
    """Strided too, anywhere in nested values; what lies in this client's arena is not copied by it."""
    with Client(shared_server, channel=channel) as client:
        x = torch.arange(12.0).view(3, 4)
        result, (nested,) = client.call("echo", [Foreign(x.T), ({"x": Foreign(x[:0])},)])
        assert torch.equal(result, x.T)
        assert nested["x"].shape == (0, 4)
        assert client.statistics().tensors_copied == 1
        loan = client.empty((3, 4), torch.float32).copy_(x)
        assert torch.equal(client.call("double", Foreign(loan)), x * 2)
        assert client.statistics().tensors_copied == 1


def test_a_dlpack_that_fails_is_a_local_error_and_costs_nothing(shared_server: str, channel: ChannelKind) -> None:
    """Nothing is sent, the tensors before it hold no room, and the reason is told."""
    with Client(shared_server, channel=channel, arena_bytes=64 * KIB) as client:
        for _ in range(10):
            with pytest.raises(LocalProtocolError, match=r"a Broken can't be sent.*another planet"):
                client.call("echo", torch.ones(8 * KIB), Broken(torch.ones(1)))
        assert client.statistics().tensors_sent == 0
        assert client.call("echo", 1) == 1


def test_what_requires_a_gradient_is_sent_detached(shared_server: str, channel: ChannelKind) -> None:
    """A leaf, something computed, and a view of a loan that has got a history: values arrive, the graph stays."""
    with Client(shared_server, channel=channel) as client:
        leaf = torch.arange(4.0, requires_grad=True)
        computed = leaf * 3
        loan = client.empty((4,), torch.float32).fill_(2.0).requires_grad_()
        for x in (leaf, computed, loan, loan[1:], torch.nn.Parameter(torch.ones(2))):
            result = client.call("echo", x)
            assert torch.equal(result, x.detach())
            assert not result.requires_grad
            assert x.requires_grad, "the sender's own is what it was"
        computed.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [3.0] * 4


def test_a_borrowed_result_may_be_sent_on(shared_server: str, channel: ChannelKind) -> None:
    """It lies in the server's arena, not in this one: it is copied in, like any other, also to another server."""
    with Client(shared_server, channel=channel) as client, Client(shared_server, channel=channel) as other:
        x = client.call("fill", 100, 3.0)
        y = client.call("double", x)
        z = other.call("double", y[::2])
        assert torch.equal(z, torch.full((50,), 12.0))
        assert client.statistics().tensors_copied == other.statistics().tensors_copied == 1


def test_a_result_can_be_kept_while_many_others_come_and_go(shared_server: str, channel: ChannelKind) -> None:
    """Whatever still looks at it: the tensor, a slice, an array, a tensor made from that."""
    with Client(shared_server, channel=channel, arena_bytes=64 * KIB) as client:
        held = [
            client.call("fill", 500, 1.0),
            client.call("fill", 500, 2.0)[100:200],
            client.call("fill", 500, 3.0).numpy(),
            torch.from_numpy(client.call("fill", 500, 4.0).numpy()[::2]),
            torch.utils.dlpack.from_dlpack(client.call("fill", 500, 5.0)),
            memoryview(client.call("fill", 500, 6.0).numpy()),
        ]
        for i in range(100):
            client.call("fill", 4 * KIB, float(-i))
        assert [set(np.asarray(one).tolist()) for one in held] == [{float(i)} for i in range(1, 7)]


def test_a_handler_may_keep_an_argument_and_return_it_later(serve: Serve, address: str, channel: ChannelKind) -> None:
    """It is borrowed for as long as it is kept, and is a copy when it comes back."""
    kept: list[torch.Tensor] = []

    def swap(x: torch.Tensor) -> torch.Tensor | None:
        kept.append(x)
        return kept.pop(0) if len(kept) > 2 else None

    serve(swap=swap)
    with Client(address, channel=channel, arena_bytes=64 * KIB) as client:
        for i in range(100):
            result = client.call("swap", torch.full((1000,), float(i)))
            if i < 2:
                assert result is None
            else:
                assert torch.equal(result, torch.full((1000,), i - 2.0))
        kept.clear()
        assert client.empty((64 * KIB,), torch.uint8).numel() == 64 * KIB
