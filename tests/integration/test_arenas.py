"""What a call copies, what takes up room in the arenas, and what happens when they are full."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shmtransport import ArenaFull, CallTimeout, Client, LocalProtocolError, MessageTooLarge, Server, TensorTooLarge
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import MIB, Serve, echo


def test_results_made_by_empty_are_not_copied(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Nor slices and views of them, nor in nested structures, nor one sent twice."""
    server: Server

    def compute(n: int) -> list[torch.Tensor]:
        out = server.empty((n, 4), torch.float32).fill_(n)
        return [out, out[1:], out.view(-1), out]

    server = serve(compute=compute)
    with Client(address, channel=channel) as client:
        for n in range(2, 20):
            first, rest, flat, again = client.call("compute", n)
            assert torch.equal(first, torch.full((n, 4), float(n)))
            assert torch.equal(rest, first[1:])
            assert torch.equal(flat, first.view(-1))
            assert torch.equal(again, first)
    assert server.statistics().bytes_copied == 0
    assert server.statistics().tensors_copied == 0


def test_arguments_made_by_empty_are_not_copied(shared_server: str, channel: ChannelKind) -> None:
    """A loan is sent by descriptor, whole, sliced, viewed or through numpy; and may be sent again."""
    with Client(shared_server, channel=channel) as client:
        x = client.empty((8, 16), torch.float32).fill_(1)
        assert client.call("double", x).sum() == 256
        assert client.call("double", x[2:4]).sum() == 64
        assert client.call("double", x.view(-1)).sum() == 256
        assert client.call("double", x.view(torch.int32)).shape == (8, 16)
        assert client.call("echo", x.numpy()).sum() == 128
        assert client.statistics().bytes_copied == 0
        client.call("double", x.T)
        assert client.statistics().bytes_copied == 8 * 16 * 4, "a transposed loan is copied once"


def test_the_handler_sees_the_callers_memory_itself(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Zero copies on the way: the server's view and the client's loan are one memory."""
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> None:
        kept.append(x)

    serve(keep=keep)
    with Client(address, channel=channel) as client:
        x = client.empty((4,), torch.float32).fill_(1)
        client.call("keep", x)
        x[2] = 5
        assert kept[0].tolist() == [1, 1, 5, 1]
        kept.clear()


def test_many_calls_wrap_a_small_arena_with_every_byte_right(shared_server: str, channel: ChannelKind) -> None:
    """500 calls of changing sizes go round both 64 KiB arenas many times; some results are held for a while."""
    generator = torch.Generator().manual_seed(7)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    sent = 0
    with Client(shared_server, channel=channel, arena_bytes=64 * 1024) as client:
        for i in range(500):
            x = torch.randn(int(torch.randint(1, 1500, (1,), generator=generator)), generator=generator)
            sent += x.nbytes
            y = client.call("double", x)
            assert torch.equal(y, x * 2), f"call {i}"
            if i % 7 == 0:
                held.append((y, x * 2))
            if len(held) > 3:
                held.pop(i % 3)
            assert all(torch.equal(a, b) for a, b in held), f"a held result changed by call {i}"
    assert sent > 20 * 64 * 1024


def test_a_calls_arguments_are_free_again_when_its_result_is_there(shared_server: str, channel: ChannelKind) -> None:
    """An arena with room for one argument serves any number of calls in turn: the server's release comes in time."""
    with Client(shared_server, channel=channel, arena_bytes=64 * 1024, reply_arena_bytes=MIB) as client:
        x = torch.ones(10 * 1024)  # 40 KiB of 64
        for _ in range(100):
            assert client.call("echo", [x.shape[0], x])[0] == 10 * 1024


def test_held_results_fill_the_arena_and_dropping_them_makes_room(shared_server: str, channel: ChannelKind) -> None:
    """A result without room waits, no longer than its call; one for which nothing can make room is refused."""
    with Client(shared_server, channel=channel, arena_bytes=MIB) as client:
        hasty = client.with_options(timeout_s=0.2)
        held = [client.call("fill", 64 * 1024, float(i)) for i in range(4)]
        with pytest.raises(CallTimeout, match=r"4 received tensors are kept here"):
            hasty.call("fill", 64 * 1024, 9.0)
        assert [int(result[0]) for result in held] == [0, 1, 2, 3]
        part = held.pop(1)[1000:1001]
        with pytest.raises(CallTimeout):
            hasty.call("fill", 64 * 1024, 9.0)
        assert part.item() == 1.0, "a slice keeps its block"
        del part
        assert client.call("fill", 64 * 1024, 9.0)[5] == 9.0
        held.clear()
        assert torch.equal(client.call("fill", 200 * 1024, 3.0), torch.full((200 * 1024,), 3.0))


def test_loans_fill_the_arena_and_dropping_them_makes_room(shared_server: str, channel: ChannelKind) -> None:
    """The same for the caller's own loans; the error's figures are those of this arena."""
    with Client(shared_server, channel=channel, arena_bytes=MIB) as client:
        loans = [client.empty((256 * 1024,), torch.uint8) for _ in range(4)]
        with pytest.raises(ArenaFull, match=r"4 blocks held"):
            client.empty((1,), torch.uint8)
        with pytest.raises(ArenaFull):
            client.call("echo", torch.zeros(1))
        loans.pop(2)
        assert client.empty((256 * 1024,), torch.uint8).numel() == 256 * 1024
        assert client.call("echo", torch.ones(3)).tolist() == [1, 1, 1]


def test_a_tensor_larger_than_the_arena_is_refused_with_figures(shared_server: str, channel: ChannelKind) -> None:
    """TensorTooLarge: waiting can't help, and the message says what would; on either side of the call."""
    with Client(shared_server, channel=channel, arena_bytes=MIB) as client:
        with pytest.raises(TensorTooLarge, match=r"2\.0 MiB.*1\.0 MiB.*raise arena_bytes"):
            client.call("echo", torch.zeros(2 * MIB, dtype=torch.uint8))
        with pytest.raises(TensorTooLarge, match=r"2\.0 MiB.*1\.0 MiB"):
            client.empty((2 * MIB,), torch.uint8)
        with pytest.raises(TensorTooLarge, match=r"on the server.*2\.0 MiB.*1\.0 MiB"):
            client.call("fill", MIB // 2, 1.0)
        assert client.call("fill", MIB // 4, 1.0).numel() == MIB // 4, "the whole arena can be used"


def test_a_message_of_too_many_plain_bytes_is_refused_with_figures(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """MessageTooLarge on either side; nothing was sent, no block stays held, the connection goes on."""
    serve(echo=echo, large=lambda: "x" * 100_000)
    with Client(address, channel=channel, arena_bytes=64 * 1024) as client:
        for _ in range(40):
            with pytest.raises(MessageTooLarge, match=r"\d+ bytes; the limit is 65536"):
                client.call("echo", torch.zeros(1024), b"x" * 70_000)
        with pytest.raises(MessageTooLarge, match="on the server"):
            client.call("large")
        assert client.call("echo", "x" * 60_000) == "x" * 60_000


def test_both_sides_can_raise_the_message_limit(serve: Serve, address: str, channel: ChannelKind) -> None:
    """With max_message_bytes raised on both sides larger messages go, both ways; raised on one the error stays."""
    serve({"max_message_bytes": MIB}, echo=echo, large=lambda: "x" * 100_000)
    with Client(address, channel=channel, timeout_s=5.0, max_message_bytes=MIB) as client:
        assert client.call("echo", b"x" * 500_000) == b"x" * 500_000
    with Client(address, channel=channel, timeout_s=5.0) as client:
        with pytest.raises(MessageTooLarge):
            client.call("echo", b"x" * 500_000)
        with pytest.raises(MessageTooLarge, match="on the server"):
            client.call("large")
        assert client.call("echo", 1) == 1


def test_more_tensors_than_a_message_takes_is_a_local_error(shared_server: str, channel: ChannelKind) -> None:
    """The blocks of the tensors before it are free again."""
    with Client(shared_server, channel=channel, arena_bytes=256 * 1024) as client:
        for _ in range(4):
            with pytest.raises(LocalProtocolError, match="1024 tensors"):
                client.call("echo", [torch.zeros(1) for _ in range(1025)])
        assert client.call("echo", torch.ones(2)).tolist() == [1, 1]


# Snapshots


def test_a_snapshot_never_changes_afterwards(serve: Serve, address: str, channel: ChannelKind) -> None:
    """With snapshot=True the server can't change a result that the client has checked; without, it can."""
    server: Server
    kept: list[torch.Tensor] = []

    def give() -> list[Any]:
        kept.append(server.empty((16,), torch.float32).fill_(1))
        return [kept[-1], kept[-1].numpy()]

    def tamper() -> None:
        for tensor in kept:
            tensor.fill_(666)

    server = serve(give=give, tamper=tamper)
    with Client(address, channel=channel, snapshot=True) as careful, Client(address, channel=channel) as trusting:
        private, array = careful.call("give")
        view, _ = trusting.call("give")
        trusting.call("tamper")
        assert private.tolist() == [1] * 16
        assert array.tolist() == [1] * 16
        assert view.tolist() == [666] * 16
    kept.clear()


def test_snapshots_hold_no_room_in_the_arena(shared_server: str, channel: ChannelKind) -> None:
    """A client can keep any number of them."""
    with Client(shared_server, channel=channel, arena_bytes=64 * 1024, snapshot=True) as client:
        kept = [client.call("fill", 8 * 1024, float(i)) for i in range(20)]
    assert [int(tensor[-1]) for tensor in kept] == list(range(20))
