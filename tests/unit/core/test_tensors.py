"""Tensors that the compiled twin makes and describes: what it leaves to Python, and what it does when torch can't."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from shmtransport.core import python_twin
from shmtransport.core.codec import EXT_TENSOR, REPLY_TAG
from shmtransport.core.layout import Layout
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.dtypes import TABLE
from shmtransport.memory.receive_arena import release_cells
from shmtransport.memory.segment import Segment
from shmtransport.memory.views import TENSORS
from tests.support.arenas import Pair, raw
from tests.support.cores import native_twin, needs_native
from tests.support.helpers import eventually

pytestmark = needs_native
LAYOUT = Layout(data_bytes=4096, release_slots=4)


@pytest.fixture
def segments() -> Iterator[tuple[Segment, Segment]]:
    """This side's segment and the peer's."""
    pair = Segment.create(LAYOUT), Segment.create(LAYOUT)
    yield pair
    for segment in pair:
        segment.close()


def _loans(segments: tuple[Segment, Segment], **changed: Any) -> Any:
    assert native_twin is not None
    own, peer = segments
    return native_twin.Loans(own.data, release_cells(peer), TENSORS._replace(**changed))


@pytest.fixture
def native_pair() -> Iterator[Pair]:
    """Both ends of one direction, compiled."""
    made = Pair(core=native_twin)
    yield made
    made.close()


def test_a_tensor_that_torch_can_not_make_gives_its_block_back(segments: tuple[Segment, Segment]) -> None:
    """Such as one of a dtype that it does not know."""
    loans = _loans(segments, rows=((torch.float32, "float32", 77, 32, 4, True),))
    for _ in range(100):
        with pytest.raises((BufferError, RuntimeError)):
            loans.lend((4,), torch.float32)
    assert loans.has_room(4096) or (loans.collect(), loans.has_room(4096))[1]


def test_what_is_no_table_of_tensors_is_refused(segments: tuple[Segment, Segment]) -> None:
    """A type without an exchange table can't be used."""
    with pytest.raises(AttributeError, match="exchange"):
        _loans(segments, type=int)


def test_tensors_without_a_table_are_left_to_the_python_twin() -> None:
    """Those of a torch before 2.10, or one whose table is of an older DLPack."""
    assert native_twin is not None
    assert native_twin.knows(TENSORS)
    assert not native_twin.knows(TENSORS._replace(type=int))


@pytest.mark.parametrize("twin", [python_twin, native_twin], ids=["python", "native"])
def test_a_loan_that_is_gone_is_not_held(twin: ModuleType) -> None:
    """Its block is freed by the very look for a slot: hold reports it, rather than look without end."""
    pair = Pair(core=twin)
    loans = pair.send.loans
    loan = pair.send.lend((4,), torch.float32)
    start = loan.data_ptr()
    out: list[Any] = []
    for _ in range(9):  # enough that a hold looks for releases
        assert loans.hold(start, start - pair.send._address, (4,), "float32", out) is True
    del loan
    assert loans.lend((2000,), torch.float32) is not None  # its end has been looked at, and the peer's holds keep it
    for one in out:
        pair.cells[one.slot] = one.sequence
    assert loans.has(start)
    assert loans.hold(start, start - pair.send._address, (4,), "float32", out) is None
    assert loans.claim(2**64) is None
    assert not loans.has_room(2**64)
    pair.close()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_dtype_is_made_and_understood(native_pair: Pair, row: Any) -> None:
    """By its DLPack code: a loan has the dtype that was asked for, in place, and so has what arrives."""
    loan = native_pair.send.lend((2, 3), row.torch)
    assert (loan.dtype, tuple(loan.shape), loan.is_contiguous()) == (row.torch, (2, 3), True)
    loan.view(torch.uint8).copy_(torch.arange(loan.nbytes, dtype=torch.uint8).view(2, -1) % 2)
    out: list[Any] = []
    assert native_pair.send.loans.export(loan, out) == 0
    arrived = native_pair.receive.borrow(out[0])
    assert (arrived.dtype, tuple(arrived.shape), raw(arrived)) == (row.torch, (2, 3), raw(loan))


def test_what_means_more_than_its_bytes_is_left_to_python(native_pair: Pair) -> None:
    """Subclasses, lazy conjugates and negatives, strides, parts of loans, tensors without content."""
    z = torch.tensor([1 + 2j, 3 - 1j])
    freed = torch.ones(100)
    freed.untyped_storage().resize_(0)
    cut = torch.ones(100)
    cut.untyped_storage().resize_(40)
    loan = native_pair.send.lend((8,), torch.float32)
    left = [
        torch.nn.Parameter(torch.ones(2)),
        z.conj(),
        z.conj().imag,
        torch.ones(4, 4).t(),
        torch.ones(4).expand(2, 4),
        loan[1:],
        freed,
        cut,
        torch.empty(0),
        torch.empty(3, device="meta"),
        torch.eye(2).to_sparse(),
        torch.zeros([1] * 17),
        5,
    ]
    for value in left:
        out: list[Any] = []
        assert native_pair.send.loans.export(value, out) is None
        assert out == []
    del left, loan, value
    assert native_pair.is_free()


def test_a_loan_outlives_everything_it_came_from() -> None:
    """Tensors and borrows stay valid after arenas, segments and their names are gone, and end without them."""
    pair = Pair(core=native_twin)
    loan = pair.send.lend((4,), torch.float32)
    loan.fill_(3.0)
    borrow = pair.pass_on(loan)
    pair.close()
    del pair
    gc.collect()
    assert borrow.tolist() == loan.tolist() == [3.0] * 4
    del borrow
    assert loan.sum() == 12.0


def test_tensors_may_end_on_threads_that_python_does_not_know(native_pair: Pair) -> None:
    """A storage that torch's own threads let go of, as autograd's do, ends its loan and its borrow."""
    loan = native_pair.send.lend((64,), torch.float32)
    loan.fill_(1.0)
    borrow = native_pair.pass_on(loan)
    weight = torch.ones(64, requires_grad=True)
    result = (weight * borrow).sum()  # autograd keeps the borrow for the way back
    del borrow
    assert len(native_pair.receive) == 1
    worker = threading.Thread(target=result.backward)
    worker.start()
    worker.join()
    del result, loan
    assert eventually(lambda: len(native_pair.receive) == 0)
    assert native_pair.is_free()


def test_a_message_is_made_and_taken_as_a_whole(native_pair: Pair) -> None:
    """Tensors of loans in place, others copied in, where the values name them; what was counted is what was done."""
    assert native_twin is not None
    loan = native_pair.send.lend((3,), torch.float32)
    loan.fill_(2.0)
    out: list[Any] = []
    values = ({"lent": loan, "same": [loan]}, torch.arange(4), (None, torch.ones(2, 2)))
    data, *counted = native_twin.encode_reply(9, values, lambda *_: None, out, native_pair.send.loans)
    assert counted == [2 * 12 + 32 + 16, 2, 48]
    call_id, result, tensors, nbytes = native_twin.take_call(data, REPLY_TAG, native_pair.receive.borrows)
    assert (call_id, tensors, nbytes) == (9, 4, 72)
    named, copied, (nothing, square) = result
    assert nothing is None
    assert named["lent"].data_ptr() == named["same"][0].data_ptr()
    assert [one.tolist() for one in (named["lent"], copied, square)] == [[2.0] * 3, [0, 1, 2, 3], [[1.0, 1.0]] * 2]
    del named, copied, square, result, loan, values
    assert native_pair.is_free()


@pytest.mark.parametrize(
    "wrong", [{"slot": 64}, {"sequence": 0}, {"offset": 16 * 1024}, {"dtype": "float31"}, {"shape": (0,)}]
)
def test_a_message_is_left_whole_where_one_tensor_is_not_plain(native_pair: Pair, wrong: dict[str, Any]) -> None:
    """With nothing borrowed, so that the specification can look at it again and say what is wrong."""
    assert native_twin is not None
    good = TensorDescriptor(0, (4,), "float32", 0, 1)
    bad = msgspec.structs.replace(TensorDescriptor(64, (4,), "float32", 1, 2), **wrong)
    borrows = native_pair.receive.borrows
    for descriptors in ([good, bad], [bad, good], [good, msgspec.structs.replace(good, offset=64)]):
        out: list[Any] = []

        def export(_value: Any, _depth: int, out: list[Any] = out, descriptors: list[Any] = descriptors) -> Ext:
            out.append(descriptors[len(out)])
            return Ext(EXT_TENSOR, bytes((len(out) - 1, 0)))

        data, *_ = native_twin.encode_reply(1, [object(), object()], export, out, None)
        assert native_twin.take_call(data, REPLY_TAG, borrows) is None
        assert len(borrows) == 0


_steps = st.lists(
    st.tuples(
        st.sampled_from(("lend", "copy", "send", "send a part", "release", "drop", "collect")),
        st.integers(0, 7),
        st.integers(1, 40),
    ),
    max_size=40,
)


class _Side:
    """One twin's loans, and what has become of them."""

    def __init__(self, twin: ModuleType) -> None:
        self.pair = Pair(1024, slots=4, core=twin)
        self.alive: list[torch.Tensor] = []
        self.sent: list[Any] = []

    def do(self, step: str, which: int, size: int) -> Any:
        """Do a step; what can be seen of it outside."""
        loans, out = self.pair.send.loans, []  # type: tuple[Any, list[Any]]
        seen: Any = None
        if step == "lend":
            tensor = loans.lend((size,), torch.float32)
            if tensor is not None:
                self.alive.append(tensor)
            seen = tensor is None
        elif step == "copy":
            claim = loans.claim(size)
            seen = claim and (claim.offset, loans.hold(claim, claim.offset, (size,), "uint8", out))
            if claim is not None:
                loans.give_back(claim)  # unless it is held
        elif step in ("send", "send a part") and self.alive:
            tensor = self.alive[which % len(self.alive)]
            part = tensor[1:] if step == "send a part" and len(tensor) > 1 else tensor
            start, at = tensor.data_ptr(), part.data_ptr() - self.pair.send._address
            seen = loans.hold(start, at, tuple(part.shape), "float32", out)
        elif step == "release" and self.sent:
            one = self.sent.pop(which % len(self.sent))
            self.pair.cells[one.slot] = one.sequence
        elif step == "drop" and self.alive:
            self.alive.pop(which % len(self.alive))
        elif step == "collect":
            loans.collect()
        self.sent += out
        facts = loans.blocks, loans.held_by_peer, loans.has_slot, loans.largest_gap(), loans.has_room(256)
        return seen, [(one.offset, one.shape, one.dtype, one.slot, one.sequence) for one in out], facts


@given(_steps)
@settings(max_examples=150)
def test_both_twins_lend_and_hold_alike(steps: list[tuple[str, int, int]]) -> None:
    """The same blocks, slots and sequences, and the same room, after any steps."""
    assert native_twin is not None
    sides = [_Side(python_twin), _Side(native_twin)]
    try:
        for step in steps:
            one, other = (side.do(*step) for side in sides)
            assert one == other
    finally:
        for side in sides:
            side.alive.clear()
            side.pair.close()


_fields = st.tuples(
    st.sampled_from((0, 4, 6, 64, 1020, 1024, 2**62)),
    st.lists(st.sampled_from((0, 1, 2, 64, 2**31, 2**62)), max_size=3).map(tuple),
    st.sampled_from(("float32", "uint8", "bfloat16", "float31", "", "\ud800")),
    st.sampled_from((0, 1, 3, 4, 2**62)),
    st.sampled_from((0, 1, 2, 2**62)),
)


@given(st.lists(_fields, max_size=12))
@settings(max_examples=300)
def test_both_twins_borrow_alike(descriptors: list[tuple[Any, ...]]) -> None:
    """Whatever a descriptor says, both make the same tensor of it or none, and release the same cells."""
    pairs = [Pair(1024, slots=4, core=core) for core in (python_twin, native_twin)]
    try:
        kept: list[tuple[torch.Tensor, ...]] = []
        for fields in descriptors:
            one, other = (pair.receive.borrows.borrow(*fields) for pair in pairs)
            assert (one is None) == (other is None)
            if one is not None:
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
                kept.append((one, other))
            del one, other
            assert len(pairs[0].receive) == len(pairs[1].receive) == len(kept)
        kept.clear()
        assert list(pairs[0].cells) == list(pairs[1].cells)
        assert len(pairs[0].receive) == len(pairs[1].receive) == 0
    finally:
        for pair in pairs:
            pair.close()
