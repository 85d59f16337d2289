"""How long loans and borrows of an arena last, and when their block is free again."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable

import pytest
import torch

from tests.support.arenas import Pair


@pytest.mark.parametrize(
    "derive",
    [
        lambda tensor: tensor[1:],
        lambda tensor: tensor[0, 0],
        lambda tensor: tensor.view(-1),
        lambda tensor: tensor.reshape(12, 1),
        lambda tensor: tensor.t(),
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor.expand(2, 3, 4),
        lambda tensor: tensor.unbind()[2],
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[1:, ::2],
        lambda tensor: tensor[2].numpy(),
        lambda tensor: torch.from_numpy(tensor.numpy()),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: memoryview(tensor.numpy()),
    ],
    ids=[
        "slice",
        "element",
        "flat",
        "reshape",
        "transpose",
        "detach",
        "reinterpret",
        "expand",
        "unbind",
        "numpy",
        "numpy-slice",
        "slice-numpy",
        "numpy-torch",
        "storage",
        "parameter",
        "memoryview",
    ],
)
def test_a_borrow_lasts_as_long_as_anything_over_its_storage(pair: Pair, derive: Callable[..., object]) -> None:
    """Slices, views, reshapes, transposes, numpy views, storages: each keeps the borrow; the last one releases."""
    result = pair.pass_on(torch.arange(12, dtype=torch.float32).view(3, 4))
    derived = derive(result)
    del result
    assert len(pair.receive) == 1
    assert not pair.is_free()
    del derived
    assert len(pair.receive) == 0
    assert pair.is_free()


def test_a_loan_lasts_as_long_as_anything_over_its_storage(pair: Pair) -> None:
    """A loan's bytes are not given out again while a slice or a numpy view of it lives."""
    loan = pair.send.lend((16, 16), torch.float32)
    last = loan[3:5].numpy()[1]
    del loan
    assert not pair.is_free()
    del last
    assert pair.is_free()


def test_a_copy_of_a_borrow_does_not_keep_it(pair: Pair) -> None:
    """A clone is private memory."""
    result = pair.pass_on(torch.arange(8))
    kept = result.clone()
    del result
    assert len(pair.receive) == 0
    assert pair.is_free()
    assert kept.tolist() == list(range(8))


def test_a_block_is_reused_only_after_its_loan_and_all_borrows_are_gone(pair: Pair) -> None:
    """The same loan sent twice is held three times over; no order of two of the three frees it."""
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        loan = pair.send.lend((8,), torch.int64)
        holders: list[torch.Tensor | None] = [loan, pair.pass_on(loan), pair.pass_on(loan)]
        del loan
        for index in order[:2]:
            holders[index] = None
            assert not pair.is_free()
        holders[order[2]] = None
        assert pair.is_free()


def test_a_garbage_collection_releases_a_borrow_in_a_cycle(pair: Pair) -> None:
    """A borrow that only a reference cycle holds is released by the collection that finds the cycle."""

    class Node:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.me = self

    gc.disable()
    try:
        Node(pair.pass_on(torch.ones(4)))
        assert len(pair.receive) == 1
        gc.collect()
        assert len(pair.receive) == 0
    finally:
        gc.enable()
    assert pair.is_free()


def test_a_loan_may_end_while_its_arena_is_locked(pair: Pair) -> None:
    """What runs when a loan or borrow dies takes no lock: a garbage collection inside a claim can't dead-lock."""
    loan, borrow = pair.send.lend((4,), torch.float32), pair.pass_on(torch.ones(4))
    done = threading.Event()
    holders = [loan, borrow]
    del loan, borrow

    def drop() -> None:
        holders.clear()
        done.set()

    with getattr(pair.send.loans, "_lock", contextlib.nullcontext()):  # the compiled twin has none
        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        assert done.wait(10.0), "dropping tensors waits for the arena's lock"
    thread.join()
    assert pair.is_free()


def test_borrows_released_out_of_order_are_free_at_once(pair: Pair) -> None:
    """A long-held oldest borrow doesn't keep later ones from being reused."""
    block = pair.data_bytes // 4
    oldest = pair.pass_on(torch.zeros(block, dtype=torch.uint8))
    for round_number in range(20):
        later = [pair.pass_on(torch.full((block,), round_number, dtype=torch.uint8)) for _ in range(3)]
        assert all(int(tensor[-1]) == round_number for tensor in later)
        del later
    assert int(oldest.sum()) == 0


def test_threads_share_a_send_arena(pair: Pair) -> None:
    """Loans and exports of several threads never overlap and all come back."""
    errors: list[str] = []

    def work(mark: int) -> None:
        for _ in range(60):
            loan = pair.send.lend((96,), torch.int64)
            loan.fill_(mark)
            result = pair.pass_on(loan)
            if not bool((result == mark).all()):
                errors.append(f"thread {mark} read another's bytes")

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not errors
    assert len(pair.receive) == 0
    assert pair.is_free()


def test_a_borrow_outlives_its_arenas() -> None:
    """A view stays valid after both sides have closed; dropping it then is harmless."""
    pair = Pair()
    result = pair.pass_on(torch.arange(5))
    pair.close()
    assert result.tolist() == [0, 1, 2, 3, 4]
    receive = pair.receive
    del pair, result
    assert len(receive) == 0


def test_an_abandoned_arena_releases_nothing(pair: Pair) -> None:
    """In a forked child what dies is still borrowed in the parent: its release never reaches the owner."""
    before = pair.pass_on(torch.arange(3))
    pair.receive.abandon()
    assert before.tolist() == [0, 1, 2]
    del before
    assert list(pair.cells) == [0] * len(pair.cells)
    assert not pair.is_free()
    assert pair.send.held_by_peer == 1
