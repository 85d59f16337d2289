"""What a peer forges in the release cells or in a descriptor: nothing is freed or borrowed by it."""

from __future__ import annotations

import pytest
import torch

from shmtransport.errors import PeerProtocolError
from shmtransport.memory.descriptor import TensorDescriptor
from tests.support.arenas import Pair


@pytest.mark.parametrize("forged", [0, 1, 3, 2**32, 2**63, 2**64 - 1])
def test_a_wrong_sequence_releases_nothing(pair: Pair, forged: int) -> None:
    """A cell counts only if it holds the very sequence that was given out for it; this one is 2."""
    pair.send.withdraw([pair.send.export(torch.ones(1))])
    descriptor = pair.send.export(torch.arange(8))
    assert descriptor.sequence == 2
    for slot in range(len(pair.cells)):
        pair.cells[slot] = forged
    assert not pair.is_free()
    pair.cells[descriptor.slot] = descriptor.sequence
    assert pair.is_free()


def test_a_stale_sequence_releases_nothing(pair: Pair) -> None:
    """Replaying the release of a slot's earlier tensor does not release its present one."""
    old = pair.send.export(torch.ones(8))
    pair.cells[old.slot] = old.sequence
    assert pair.is_free()
    new = pair.send.export(torch.ones(8))
    assert new.slot == old.slot
    assert new.sequence > old.sequence
    pair.cells[new.slot] = old.sequence
    assert not pair.is_free()
    pair.cells[new.slot] = new.sequence
    assert pair.is_free()


def test_a_release_in_anothers_slot_releases_nothing(pair: Pair) -> None:
    """The sequence must stand in its own slot."""
    first, second = pair.send.export(torch.ones(8)), pair.send.export(torch.ones(8))
    pair.cells[first.slot], pair.cells[second.slot] = second.sequence, first.sequence
    assert not pair.is_free()


def test_a_replayed_release_is_harmless(pair: Pair) -> None:
    """A release that is written again, before and after the block is reused, frees nothing twice."""
    descriptor = pair.send.export(torch.ones(8))
    for _ in range(3):
        pair.cells[descriptor.slot] = descriptor.sequence
        assert pair.is_free()
    loan = pair.send.lend((pair.data_bytes,), torch.uint8)
    pair.cells[descriptor.slot] = descriptor.sequence
    assert not pair.is_free()
    del loan


def test_a_release_does_not_end_a_loan(pair: Pair) -> None:
    """However early the peer releases, the owner's own tensor keeps its bytes."""
    loan = pair.send.lend((8,), torch.float32)
    descriptor = pair.send.export(loan)
    pair.cells[descriptor.slot] = descriptor.sequence
    assert not pair.is_free()
    del loan
    assert pair.is_free()


def test_a_descriptor_sent_twice_is_the_peers_error(pair: Pair) -> None:
    """While its borrow is held, the same sequence can't be borrowed again; the first borrow stays."""
    descriptor = pair.send.export(torch.arange(3))
    borrow = pair.receive.borrow(descriptor)
    with pytest.raises(PeerProtocolError, match=f"slot {descriptor.slot}, which an earlier tensor still holds"):
        pair.receive.borrow(descriptor)
    assert len(pair.receive) == 1
    assert borrow.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "descriptor",
    [
        TensorDescriptor(0, (2,), "float32", 64, 1),
        TensorDescriptor(0, (16 * 1024,), "float32", 0, 1),
        TensorDescriptor(2**62, (2,), "float32", 0, 1),
        TensorDescriptor(0, (2,), "object", 0, 1),
    ],
)
def test_an_invalid_descriptor_is_never_borrowed(pair: Pair, descriptor: TensorDescriptor) -> None:
    """An invalid descriptor raises before anything is held."""
    with pytest.raises(PeerProtocolError):
        pair.receive.borrow(descriptor)
    assert len(pair.receive) == 0


@pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (2**62, 2**62, 0)])
def test_an_empty_tensor_that_torch_cannot_make_is_the_peers_error(pair: Pair, shape: tuple[int, ...]) -> None:
    """Sizes that overflow are the peer's error also when the tensor has no elements."""
    with pytest.raises(PeerProtocolError):
        pair.receive.borrow(TensorDescriptor(0, shape, "float32", 0, 0))
