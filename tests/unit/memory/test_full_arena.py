"""An arena without room: waiting for the peer to make some, what the errors say, and that nothing stays held."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from shmtransport.core import NextFitAllocator
from shmtransport.errors import ArenaFull, PeerDied, TensorTooLarge
from shmtransport.statistics import Statistics
from shmtransport.units import MIB
from tests.support.arenas import Pair


def test_a_full_arena_says_what_is_held_and_what_to_do() -> None:
    """ArenaFull names the request, the arena, its largest gap, the blocks, the borrows, their age, the remedy."""
    pair = Pair(4 * MIB)
    loan = pair.send.lend((2 * MIB,), torch.uint8)
    borrow = pair.pass_on(torch.zeros(MIB, dtype=torch.uint8))
    with pytest.raises(ArenaFull) as caught:
        pair.send.lend((3 * MIB,), torch.uint8)
    text = str(caught.value)
    for figure in ("requested 3.0 MiB", "arena is 4.0 MiB", "1.0 MiB in its largest gap", "2 blocks held", "1 borrows"):
        assert figure in text
    assert re.search(r"oldest for \d+\.\d s", text)
    assert "release results or raise arena_bytes" in text
    del loan, borrow
    assert pair.is_free()
    pair.close()


def test_a_full_arena_without_borrows_says_so(pair: Pair) -> None:
    """Where only this side's own loans are in the way, the message doesn't blame the peer."""
    loan = pair.send.lend((pair.data_bytes,), torch.uint8)
    with pytest.raises(ArenaFull, match="1 blocks held, none of them by the peer"):
        pair.send.export(torch.ones(3))
    del loan


def test_a_tensor_larger_than_the_arena_says_how_large_it_must_be() -> None:
    """TensorTooLarge names both sizes and the arena_bytes that would do, for loans and for exports."""
    pair = Pair(MIB)
    for attempt in (
        lambda: pair.send.lend((3 * MIB,), torch.uint8),
        lambda: pair.send.export(torch.empty(3 * MIB, dtype=torch.uint8)),
        lambda: pair.send.export_array(np.empty(3 * MIB, dtype=np.uint8)),
    ):
        with pytest.raises(TensorTooLarge, match=r"3\.0 MiB can't fit an arena of 1\.0 MiB") as caught:
            attempt()
        remedy = re.search(r"raise arena_bytes to (\d+)", str(caught.value))
        assert remedy is not None
        assert int(remedy[1]) >= 3 * MIB
    assert pair.is_free()
    pair.close()


def test_a_tensor_of_the_whole_arena_fits(pair: Pair) -> None:
    """The arena's size is what a tensor can have, to the byte."""
    assert pair.is_free()
    with pytest.raises(TensorTooLarge):
        pair.send.lend((pair.data_bytes + 1,), torch.uint8)


def test_without_a_free_release_slot_the_arena_is_full() -> None:
    """As many unreleased tensors as slots: ArenaFull with the figures; the failed export's copy is not leaked."""
    pair = Pair(4096, slots=2)
    borrows = [pair.pass_on(torch.ones(1)) for _ in range(2)]
    for _ in range(3):
        with pytest.raises(ArenaFull, match=r"^2 sent tensors are unreleased.*2 borrows by the peer.*release results"):
            pair.send.export(torch.ones(1))
    del borrows[0]
    borrows.append(pair.pass_on(torch.ones(1)))
    borrows.clear()
    assert pair.is_free()
    pair.close()


def test_withdrawing_frees_what_was_never_sent(pair: Pair) -> None:
    """Withdrawn descriptors hold neither block nor slot; a loan among them stays a loan."""
    loan = pair.send.lend((8,), torch.float32)
    loan.fill_(7.0)
    pair.send.withdraw([pair.send.export(loan), pair.send.export(torch.ones(4)), pair.send.export(torch.ones(0))])
    assert not pair.is_free()
    assert loan.tolist() == [7.0] * 8
    del loan
    assert pair.is_free()
    for _ in range(3 * len(pair.cells)):
        pair.send.withdraw([pair.send.export(torch.ones(1))])
    assert pair.is_free()


# --- waiting for room -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["room", "slot"])
def test_a_claim_waits_until_the_peer_has_released_something(what: str) -> None:
    """For a gap that is large enough, or for a release slot; other threads may use the arena while it waits."""
    borrows: list[torch.Tensor] = []
    looks: list[bool] = []

    def release_one() -> None:
        looks.append(pair.send.export(torch.empty(0)).sequence == 0)
        if len(looks) % 3 == 0:
            borrows.pop(0)

    pair = Pair(4096, slots=2, claim_timeout_s=3600.0, check_peer=release_one)
    size = {"room": 2048, "slot": 64}[what]
    for number in range(12):
        borrows.append(pair.pass_on(torch.full((size,), number, dtype=torch.uint8)))
        assert bool((borrows[-1] == number).all())
    assert len(looks) == 3 * 10, "the first two had room"
    assert all(looks)
    snapshot = Statistics.of(pair.counters)
    assert snapshot.stalls == 10
    assert snapshot.stall_seconds > 0
    borrows.clear()
    assert pair.is_free()
    pair.close()


def test_a_claim_waits_until_its_gap_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases that leave only small gaps are not enough: it goes on to wait for the right one, without any report."""
    monkeypatch.delattr(NextFitAllocator, "largest_gap")
    borrows: list[torch.Tensor] = []
    pair = Pair(4096, claim_timeout_s=3600.0, check_peer=lambda: borrows.pop(order.pop(0)))
    borrows += [pair.pass_on(torch.empty(1024, dtype=torch.uint8)) for _ in range(4)]
    order = [0, 1, 0]  # the first, the third, then the second: only now there are 2 KiB in one piece
    assert pair.send.lend((2048,), torch.uint8).shape == (2048,)
    assert order == []
    borrows.clear()
    pair.close()


def test_a_claim_gives_up_when_its_time_is_up() -> None:
    """ArenaFull says what is held, as if there had been no wait; what was tried counts as a stall."""
    looks: list[None] = []
    pair = Pair(4096, claim_timeout_s=0.02, check_peer=lambda: looks.append(None))
    borrow = pair.pass_on(torch.empty(4096, dtype=torch.uint8))
    with pytest.raises(ArenaFull, match=r"1 borrows by the peer, oldest for \d+\.\d s"):
        pair.send.lend((64,), torch.uint8)
    assert looks
    assert Statistics.of(pair.counters).stalls == 1
    del borrow
    assert pair.is_free()
    pair.close()


def test_a_claim_does_not_wait_for_a_peer_that_holds_nothing() -> None:
    """Only this side's own loans are in the way: no peer could make room, so the error comes at once."""

    def never() -> None:
        raise AssertionError("waited")

    pair = Pair(4096, claim_timeout_s=3600.0, check_peer=never)
    loan = pair.send.lend((4096,), torch.uint8)
    with pytest.raises(ArenaFull, match="none of them by the peer"):
        pair.send.lend((64,), torch.uint8)
    del loan
    assert pair.is_free()
    pair.close()


def test_a_claim_stops_waiting_when_the_peer_is_gone() -> None:
    """``check_peer`` raises; the arena is as it was, its lock free."""

    def gone() -> None:
        raise PeerDied("the peer has ended")

    pair = Pair(4096, claim_timeout_s=3600.0, check_peer=gone)
    borrow = pair.pass_on(torch.empty(4096, dtype=torch.uint8))
    for _ in range(2):
        with pytest.raises(PeerDied):
            pair.send.lend((64,), torch.uint8)
    assert pair.send.held_by_peer == 1
    del borrow
    assert pair.is_free()
    assert pair.send.held_by_peer == 0
    pair.close()
