"""Loans, exports, borrows and drops of an arena in any order, against a model of who holds which bytes."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmtransport.core.layout import BLOCK_ALIGNMENT, round_up
from shmtransport.errors import ArenaFull, TensorTooLarge
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.dtypes import TABLE, DType
from tests.support.arenas import Pair, random_tensor, raw


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
        self.address = self.pair.send.lend((1,), torch.uint8).data_ptr()
        self.seed = 0
        self.blocks: list[_Block] = []
        self.loans: list[tuple[torch.Tensor, bytes, _Block]] = []
        self.sent: list[tuple[TensorDescriptor, bytes, _Block]] = []
        self.borrows: list[tuple[torch.Tensor, bytes, _Block]] = []

    def teardown(self) -> None:
        self.loans.clear()
        self.borrows.clear()
        self.pair.send.withdraw([descriptor for descriptor, _, _ in self.sent])
        try:
            assert len(self.pair.receive) == 0
            assert self.pair.is_free(), "all is dropped, and yet the arena is not one gap"
        finally:  # hypothesis drops an example that it can't finish, and with it what is raised here
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
            loan = self.pair.send.lend(shape, row.torch)
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
        try:
            descriptor = self.pair.send.export(part)
        except ArenaFull:
            assert slots_left == 0
            return
        assert descriptor.sequence not in self.pair.send.copies
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


ArenaMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestArenaMachine = ArenaMachine.TestCase
