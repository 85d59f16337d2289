"""The two ends of one direction: who may write which bytes when, and when a block is free again.

One process plays both sides; each end of a segment is a mapping of its own, as between two processes.
"""

from __future__ import annotations

import gc
import math
import random
import re
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmtransport.arena import ReceiveArena, SendArena, release_cells
from shmtransport.descriptor import TensorDescriptor
from shmtransport.dtypes import TABLE, DType
from shmtransport.errors import ArenaFull, LocalProtocolError, PeerProtocolError, TensorTooLarge, TransportError
from shmtransport.layout import BLOCK_ALIGNMENT, Layout, round_up
from shmtransport.segment import Segment
from shmtransport.statistics import Counters

MIB = 1 << 20


class Pair:
    """A send arena and the peer's receive arena over it."""

    def __init__(self, data_bytes: int = 16 * 1024, slots: int = 64) -> None:
        self.data_bytes = data_bytes
        layout = Layout(data_bytes=data_bytes, release_slots=slots)
        self.owner, self.reader = Segment.create(layout), Segment.create(layout)
        self._segments = [
            self.owner,
            self.reader,
            Segment.attach(self.owner.name, self.owner.layout),
            Segment.attach(self.reader.name, self.reader.layout),
        ]
        self.counters = Counters()
        self.cells = release_cells(self.reader)
        self.send = SendArena(self.owner, release_cells(self._segments[3]), self.counters)
        self.receive = ReceiveArena(self._segments[2], self.cells)

    def pass_on(self, value: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Send a value to the other side."""
        export = self.send.export if isinstance(value, torch.Tensor) else self.send.export_array
        return self.receive.borrow(export(value))

    def is_free(self) -> bool:
        """Whether one tensor of the whole arena could be had now."""
        try:
            self.send.empty((self.data_bytes,), torch.uint8)
        except ArenaFull:
            return False
        return True

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, whatever its dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(row: DType, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits in an ordinary tensor: among floats NaNs with payloads, subnormals and infinities too."""
    nbytes = math.prod(shape) * row.itemsize
    data = bytearray(random.Random(seed).randbytes(nbytes))
    if row.name == "bool":
        data = bytearray(byte & 1 for byte in data)
    return torch.frombuffer(data, dtype=row.torch).view(shape)


# --- the state machine ------------------------------------------------------------------------------------------------


class _Block:
    """The model of a block: its range, whether its loan lives, and how many descriptors or borrows hold it."""

    def __init__(self, offset: int, nbytes: int, loaned: bool) -> None:
        self.offset = offset
        self.nbytes = round_up(nbytes, BLOCK_ALIGNMENT)
        self.loaned = loaned
        self.holds = 0


class ArenaMachine(RuleBasedStateMachine):
    """Loans, exports, borrows and drops in any order, against a model of who holds which bytes."""

    SLOTS = 12

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(4096, self.SLOTS)
        self.address = self.pair.send.empty((1,), torch.uint8).data_ptr()
        self.seed = 0
        self.blocks: list[_Block] = []
        self.loans: list[tuple[torch.Tensor, bytes, _Block]] = []
        self.sent: list[tuple[TensorDescriptor, bytes, _Block]] = []
        self.borrows: list[tuple[torch.Tensor, bytes, _Block]] = []

    def teardown(self) -> None:
        self.loans.clear()
        self.borrows.clear()
        self.pair.send.withdraw([descriptor for descriptor, _, _ in self.sent])
        assert len(self.pair.receive) == 0
        assert self.pair.is_free(), "all is dropped, and yet the arena is not one gap"
        self.pair.close()

    def held(self) -> list[_Block]:
        self.blocks = [block for block in self.blocks if block.loaned or block.holds]
        return sorted(self.blocks, key=lambda block: block.offset)

    def model_gap(self) -> int:
        largest = end = 0
        for block in self.held():
            largest = max(largest, block.offset - end)
            end = block.offset + block.nbytes
        return max(largest, self.pair.data_bytes - end)

    def add(self, offset: int, nbytes: int, *, loaned: bool) -> _Block:
        block = _Block(offset, nbytes, loaned)
        for other in self.held():
            assert offset + block.nbytes <= other.offset or other.offset + other.nbytes <= offset, "blocks overlap"
        assert offset % BLOCK_ALIGNMENT == 0
        assert offset + nbytes <= self.pair.data_bytes
        self.blocks.append(block)
        return block

    def content(self, row: DType, shape: tuple[int, ...]) -> torch.Tensor:
        self.seed += 1
        return random_tensor(row, shape, self.seed)

    @rule(row=st.sampled_from(TABLE), elements=st.integers(1, 160), parts=st.sampled_from([1, 2, 3]))
    def lend(self, row: DType, elements: int, parts: int) -> None:
        shape = (elements, parts)
        nbytes = elements * parts * row.itemsize
        gap = self.model_gap()
        try:
            loan = self.pair.send.empty(shape, row.torch)
        except ArenaFull:
            assert gap < round_up(nbytes, BLOCK_ALIGNMENT), "ArenaFull although a gap is large enough"
            return
        except TensorTooLarge:
            assert nbytes > self.pair.data_bytes
            return
        block = self.add(loan.data_ptr() - self.address, nbytes, loaned=True)
        assert tuple(loan.shape) == shape
        content = self.content(row, shape)
        loan.copy_(content)
        self.loans.append((loan, raw(content), block))

    @rule(row=st.sampled_from(TABLE), elements=st.integers(1, 160))
    def export_a_copy(self, row: DType, elements: int) -> None:
        content = self.content(row, (elements,))
        gap, slots_left = self.model_gap(), self.SLOTS - sum(block.holds for block in self.held())
        try:
            descriptor = self.pair.send.export(content)
        except ArenaFull:
            assert slots_left == 0 or gap < round_up(content.nbytes, BLOCK_ALIGNMENT)
            return
        block = self.add(descriptor.offset, content.nbytes, loaned=False)
        block.holds = 1
        self.sent.append((descriptor, raw(content), block))

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def export_a_loan(self, data: st.DataObject) -> None:
        loan, _, block = self.loans[data.draw(st.integers(0, len(self.loans) - 1))]
        start = data.draw(st.integers(0, len(loan) - 1))
        part = loan[start : data.draw(st.integers(start + 1, len(loan)))]
        slots_left = self.SLOTS - sum(block.holds for block in self.held())
        copied = self.pair.counters.bytes_copied
        try:
            descriptor = self.pair.send.export(part)
        except ArenaFull:
            assert slots_left == 0
            return
        assert self.pair.counters.bytes_copied == copied
        assert descriptor.offset == part.data_ptr() - self.address
        block.holds += 1
        self.sent.append((descriptor, raw(part), block))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def borrow(self, data: st.DataObject) -> None:
        descriptor, content, block = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        self.borrows.append((self.pair.receive.borrow(descriptor), content, block))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        descriptor, _, block = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        self.pair.send.withdraw([descriptor])
        block.holds -= 1

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def drop_a_loan(self, data: st.DataObject) -> None:
        self.loans.pop(data.draw(st.integers(0, len(self.loans) - 1)))[2].loaned = False

    @precondition(lambda self: self.borrows)
    @rule(data=st.data())
    def drop_a_borrow(self, data: st.DataObject) -> None:
        self.borrows.pop(data.draw(st.integers(0, len(self.borrows) - 1)))[2].holds -= 1

    @invariant()
    def nobodys_bytes_change(self) -> None:
        for tensor, content, _ in self.loans + self.borrows:
            assert raw(tensor) == content, "the bytes of a live loan or borrow changed"
        data = self.pair.owner.view[self.pair.owner.layout.data_offset :]
        for descriptor, content, _ in self.sent:
            assert bytes(data[descriptor.offset : descriptor.offset + len(content)]) == content
        assert len(self.pair.receive) == len(self.borrows)


ArenaMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestArenaMachine = ArenaMachine.TestCase


# --- lifetimes --------------------------------------------------------------------------------------------------------


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
    loan = pair.send.empty((16, 16), torch.float32)
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
        loan = pair.send.empty((8,), torch.int64)
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
    loan, borrow = pair.send.empty((4,), torch.float32), pair.pass_on(torch.ones(4))
    done = threading.Event()
    holders = [loan, borrow]
    del loan, borrow

    def drop() -> None:
        holders.clear()
        done.set()

    with pair.send._lock:
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
            loan = pair.send.empty((96,), torch.int64)
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
    """A view stays valid after both sides have closed; its end then disturbs nobody."""
    pair = Pair()
    result = pair.pass_on(torch.arange(5))
    pair.close()
    assert result.tolist() == [0, 1, 2, 3, 4]
    receive = pair.receive
    del pair, result
    assert len(receive) == 0


# --- releases that a peer forges --------------------------------------------------------------------------------------


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
    loan = pair.send.empty((pair.data_bytes,), torch.uint8)
    pair.cells[descriptor.slot] = descriptor.sequence
    assert not pair.is_free()
    del loan


def test_a_release_does_not_end_a_loan(pair: Pair) -> None:
    """However early the peer releases, the owner's own tensor keeps its bytes."""
    loan = pair.send.empty((8,), torch.float32)
    descriptor = pair.send.export(loan)
    pair.cells[descriptor.slot] = descriptor.sequence
    assert not pair.is_free()
    del loan
    assert pair.is_free()


def test_a_descriptor_sent_twice_is_the_peers_error(pair: Pair) -> None:
    """While its borrow is held, the same sequence can't be borrowed again; the first borrow stays."""
    descriptor = pair.send.export(torch.arange(3))
    borrow = pair.receive.borrow(descriptor)
    with pytest.raises(PeerProtocolError, match=f"sequence {descriptor.sequence} was sent before"):
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


# --- no room ----------------------------------------------------------------------------------------------------------


def test_a_full_arena_says_what_is_held_and_what_to_do() -> None:
    """ArenaFull names the request, the arena, its largest gap, the blocks, the borrows, their age, the remedy."""
    pair = Pair(4 * MIB)
    loan = pair.send.empty((2 * MIB,), torch.uint8)
    borrow = pair.pass_on(torch.zeros(MIB, dtype=torch.uint8))
    with pytest.raises(ArenaFull) as caught:
        pair.send.empty((3 * MIB,), torch.uint8)
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
    loan = pair.send.empty((pair.data_bytes,), torch.uint8)
    with pytest.raises(ArenaFull, match="1 blocks held, none of them by the peer"):
        pair.send.export(torch.ones(3))
    del loan


def test_a_tensor_larger_than_the_arena_says_how_large_it_must_be() -> None:
    """TensorTooLarge names both sizes and the arena_bytes that would do, for loans and for exports."""
    pair = Pair(MIB)
    for attempt in (
        lambda: pair.send.empty((3 * MIB,), torch.uint8),
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
    assert pair.send.arena_bytes == pair.data_bytes
    assert pair.is_free()
    with pytest.raises(TensorTooLarge):
        pair.send.empty((pair.data_bytes + 1,), torch.uint8)


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
    loan = pair.send.empty((8,), torch.float32)
    loan.fill_(7.0)
    pair.send.withdraw([pair.send.export(loan), pair.send.export(torch.ones(4)), pair.send.export(torch.ones(0))])
    assert not pair.is_free()
    assert loan.tolist() == [7.0] * 8
    del loan
    assert pair.is_free()
    for _ in range(3 * len(pair.cells)):
        pair.send.withdraw([pair.send.export(torch.ones(1))])
    assert pair.is_free()


# --- what can be sent, and what is copied -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_dtype_crosses_bit_for_bit(pair: Pair, row: DType) -> None:
    """NaN payloads, signed zeros and subnormals arrive as the same bits: by loan, by copy, and made contiguous."""
    source = random_tensor(row, (16, 8), seed=5)
    loan = pair.send.empty((16, 8), row.torch)
    loan.reshape(-1).view(torch.uint8).copy_(source.reshape(-1).view(torch.uint8))
    for sent, expected in (
        (loan, raw(source)),
        (source, raw(source)),
        (source[3:9], raw(source)[3 * 8 * row.itemsize : 9 * 8 * row.itemsize]),
        (source.t(), np.frombuffer(raw(source), dtype=f"V{row.itemsize}").reshape(16, 8).T.tobytes()),
    ):
        result = pair.pass_on(sent)
        assert result.dtype == row.torch
        assert result.shape == sent.shape
        assert result.is_contiguous()
        assert raw(result) == expected


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (torch.bfloat16, [0x7FC0, 0x7F81, 0xFF81, 0x7FFF, 0x8000, 0x0001]),
        (torch.float16, [0x7E00, 0x7C01, 0xFC01, 0x7FFF, 0x8000, 0x0001]),
    ],
)
def test_nan_payloads_survive(pair: Pair, dtype: torch.dtype, bits: list[int]) -> None:
    """Quiet and signalling NaNs keep their payloads, contiguous or not."""
    source = torch.frombuffer(bytearray(np.array(bits, dtype=np.uint16).tobytes()), dtype=dtype)
    spread = torch.stack((source, source), dim=1)[:, 0]
    for sent in (source, spread):
        assert pair.pass_on(sent).view(torch.uint16).tolist() == bits


@pytest.mark.parametrize("row", [row for row in TABLE if row.numpy is not None], ids=lambda row: row.name)
@pytest.mark.parametrize("kind", ["plain", "read-only", "strided", "reversed", "fortran", "big-endian"])
def test_every_numpy_array_is_copied_once(pair: Pair, row: DType, kind: str) -> None:
    """Read-only, non-contiguous and big-endian arrays arrive with their values, by one copy of just their bytes."""
    assert row.numpy is not None
    plain = np.frombuffer(bytearray(raw(random_tensor(row, (6, 4), seed=3))), dtype=row.numpy).reshape(6, 4)
    array = {
        "plain": lambda: plain,
        "read-only": lambda: np.frombuffer(plain.tobytes(), dtype=row.numpy).reshape(6, 4),
        "strided": lambda: np.repeat(plain, 2, axis=1)[:, ::2],
        "reversed": lambda: plain[::-1, ::-1],
        "fortran": lambda: np.asfortranarray(plain),
        "big-endian": lambda: plain.byteswap().view(plain.dtype.newbyteorder(">")),
    }[kind]()
    result = pair.pass_on(array)
    expected = plain[::-1, ::-1] if kind == "reversed" else plain
    assert result.dtype == row.torch
    assert result.shape == (6, 4)
    assert raw(result) == expected.tobytes()
    assert pair.counters.bytes_copied == plain.nbytes
    assert pair.counters.tensors_copied == 1


def test_tensors_in_the_arena_are_not_copied(pair: Pair) -> None:
    """A loan and its contiguous slices, views and numpy views are described where they lie."""
    loan = pair.send.empty((8, 4), torch.float32)
    loan.copy_(torch.arange(32).view(8, 4))
    for part in (loan, loan[2:5], loan[3], loan[7, 3], loan.view(-1), loan.view(2, 16), loan.view(torch.int32)):
        result = pair.pass_on(part)
        assert raw(result) == raw(part)
        loan[0, 0] += 1.0  # both look at the same bytes
        assert raw(result) == raw(part)
    result = pair.pass_on(loan.numpy())
    assert raw(result) == raw(loan)
    assert pair.counters.bytes_copied == pair.counters.tensors_copied == 0


def test_a_strided_part_of_a_loan_is_copied_once(pair: Pair) -> None:
    """A tensor in the arena that is not contiguous is made so by one copy within the arena."""
    loan = pair.send.empty((8, 4), torch.float32)
    loan.copy_(torch.arange(32).view(8, 4))
    result = pair.pass_on(loan[:, 1])
    assert result.tolist() == [1.0 + 4 * row for row in range(8)]
    assert (pair.counters.tensors_copied, pair.counters.bytes_copied) == (1, 32)


def test_a_copied_tensor_does_not_change_with_its_original(pair: Pair) -> None:
    """After export the sender may overwrite a tensor that lay outside of the arena."""
    source = torch.arange(4)
    result = pair.pass_on(source)
    source.zero_()
    assert result.tolist() == [0, 1, 2, 3]
    assert pair.counters.bytes_copied == 32


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).view(3, 4).t(),
        lambda: torch.arange(3.0).expand(5, 3),
        lambda: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        lambda: torch.arange(24.0)[::3],
        lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
        lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.tensor(3.25),
    ],
)
def test_any_strides_arrive_contiguous(pair: Pair, make: Callable[[], torch.Tensor]) -> None:
    """Transposed, expanded, permuted, strided, conjugate, negated, channels-last and 0-d: same values, one copy."""
    source = make()
    result = pair.pass_on(source)
    assert result.is_contiguous()
    assert result.shape == source.shape
    assert torch.equal(result, source.resolve_conj().resolve_neg())
    assert not result.is_conj()
    assert pair.counters.bytes_copied == source.numel() * source.element_size()
    assert pair.counters.tensors_copied == 1


def test_a_conjugate_view_of_a_loan_is_resolved(pair: Pair) -> None:
    """A lazily conjugated or negated view of a loan shares its bytes, but not its values: it is copied."""
    loan = pair.send.empty((2,), torch.complex64)
    loan.copy_(torch.tensor([1 + 2j, 3 - 4j]))
    assert pair.pass_on(loan.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert pair.pass_on(loan.conj().imag).tolist() == [-2.0, 4.0]
    assert loan.tolist() == [1 + 2j, 3 - 4j]


def test_a_zero_dimensional_loan_is_a_tensor(pair: Pair) -> None:
    """The shape () is one element; it can be lent, filled and sent without a copy."""
    loan = pair.send.empty((), torch.float64)
    loan.fill_(2.5)
    result = pair.pass_on(loan)
    assert result.shape == ()
    assert result.item() == 2.5
    assert pair.counters.tensors_copied == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 5)])
def test_an_empty_tensor_keeps_its_shape_and_takes_no_block(pair: Pair, shape: tuple[int, ...]) -> None:
    """Nothing to copy, nothing to release, and room for it even in a full arena."""
    full = pair.send.empty((pair.data_bytes,), torch.uint8)
    for sent in (pair.send.empty(shape, torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16)):
        result = pair.pass_on(sent)
        assert result.shape == shape
        assert result.dtype == torch.bfloat16
    assert pair.pass_on(np.empty(shape, dtype=np.int16)).shape == shape
    assert len(pair.receive) == 0
    assert pair.counters.tensors_copied == 0
    del full


def test_a_tensor_that_requires_grad_is_sent(pair: Pair) -> None:
    """Parameters and activations of a graph go as plain data; the original keeps its graph."""
    leaf = torch.nn.Parameter(torch.ones(3))
    for source in (leaf, leaf * 2):
        result = pair.pass_on(source)
        assert not result.requires_grad
        assert torch.equal(result, source.detach())
        assert source.requires_grad


def _quantized() -> torch.Tensor:
    return torch._empty_affine_quantized((2,), scale=1.0, zero_point=0, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, 2).to_sparse(),
        lambda: torch.ones(2, device="meta"),
        _quantized,
        lambda: torch.empty(4, dtype=torch.bits8),
    ],
    ids=["sparse", "meta", "quantised", "unknown dtype"],
)
def test_tensors_without_plain_bytes_are_refused(pair: Pair, make: Callable[[], torch.Tensor]) -> None:
    """Sparse, meta and quantised tensors and dtypes outside of the table are the caller's error, before any claim."""
    with pytest.raises(LocalProtocolError, match=r"can.* be sent"):
        pair.send.export(make())
    assert pair.is_free()


@pytest.mark.parametrize(
    "array",
    [np.array(["text"]), np.array([object()]), np.array(["2020-01-01"], "M8[D]"), np.zeros(2, "i4,f4")],
    ids=["text", "object", "date", "structured"],
)
def test_numpy_arrays_without_a_torch_dtype_are_refused(pair: Pair, array: np.ndarray) -> None:
    """Text, objects, dates and structures are the caller's error, which names the dtype."""
    with pytest.raises(LocalProtocolError, match="can't be sent") as caught:
        pair.send.export_array(array)
    assert str(array.dtype) in str(caught.value)


@pytest.mark.parametrize(("shape", "dtype"), [((-1,), torch.int8), ((1,) * 17, torch.int8), ((2,), torch.bits8)])
def test_a_loan_that_could_not_be_sent_is_refused(pair: Pair, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Negative sizes, more than 16 dimensions and unknown dtypes are the caller's error at once."""
    with pytest.raises(LocalProtocolError):
        pair.send.empty(shape, dtype)
    assert pair.is_free()


def test_sixteen_dimensions_are_sent(pair: Pair) -> None:
    """16 dimensions are the most that a descriptor takes."""
    source = torch.arange(8.0).view((1,) * 13 + (2, 2, 2))
    assert torch.equal(pair.pass_on(source), source)


@pytest.mark.parametrize("kind", ["in the arena", "empty"])
def test_more_than_sixteen_dimensions_are_refused_wherever_they_lie(pair: Pair, kind: str) -> None:
    """More than 16 dimensions are the caller's error also where nothing is copied."""
    sources = {
        "in the arena": pair.send.empty((1,), torch.float32).view((1,) * 17),
        "empty": torch.empty((1,) * 16 + (0,)),
    }
    with pytest.raises(LocalProtocolError):
        pair.send.export(sources[kind])


@pytest.mark.parametrize("kind", ["negative stride", "odd stride"])
def test_a_contiguous_array_with_unusual_strides_is_sent(pair: Pair, kind: str) -> None:
    """One element counts as contiguous whatever its strides are; it is sent all the same."""
    arrays = {
        "negative stride": np.arange(7, 8)[::-1],
        "odd stride": np.full(1, 7, dtype=[("a", "i1"), ("b", "i4")])["b"],
    }
    assert pair.pass_on(arrays[kind]).tolist() == [7]


def test_a_masked_array_is_refused(pair: Pair) -> None:
    """A mask can't travel; losing it would change the values."""
    with pytest.raises(LocalProtocolError):
        pair.send.export_array(np.ma.masked_array([1, 2], mask=[False, True]))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_a_nested_tensor_is_refused(pair: Pair) -> None:
    """A nested tensor has no one shape; sending it is the caller's error."""
    with pytest.raises(TransportError):
        pair.send.export(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def test_an_unaligned_array_is_sent(pair: Pair) -> None:
    """An array at an odd address is contiguous; its values arrive, aligned."""
    array = np.frombuffer(bytearray(b"\0" + np.arange(5.0).tobytes()), dtype=np.uint8)[1:].view(np.float64)
    result = pair.pass_on(array)
    assert result.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert result.data_ptr() % 64 == 0
