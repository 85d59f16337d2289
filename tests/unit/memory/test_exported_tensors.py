"""What an arena can send, what is copied on the way, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from shmtransport.core import python_twin
from shmtransport.errors import LocalProtocolError, TransportError
from shmtransport.memory.dtypes import TABLE, DType
from tests.support.arenas import Pair, random_tensor, raw


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_dtype_crosses_bit_for_bit(pair: Pair, row: DType) -> None:
    """NaN payloads, signed zeros and subnormals arrive as the same bits: by loan, by copy, and made contiguous."""
    source = random_tensor(row, (16, 8), seed=5)
    loan = pair.send.lend((16, 8), row.torch)
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
    assert pair.copied == [plain.nbytes]


def test_tensors_in_the_arena_are_not_copied(pair: Pair) -> None:
    """A loan and its contiguous slices, views and numpy views are described where they lie."""
    loan = pair.send.lend((8, 4), torch.float32)
    loan.copy_(torch.arange(32).view(8, 4))
    for part in (loan, loan[2:5], loan[3], loan[7, 3], loan.view(-1), loan.view(2, 16), loan.view(torch.int32)):
        result = pair.pass_on(part)
        assert raw(result) == raw(part)
        loan[0, 0] += 1.0  # both look at the same bytes
        assert raw(result) == raw(part)
    result = pair.pass_on(loan.numpy())
    assert raw(result) == raw(loan)
    assert pair.copied == []


def test_a_strided_part_of_a_loan_is_copied_once(pair: Pair) -> None:
    """A tensor in the arena that is not contiguous is made so by one copy within the arena."""
    loan = pair.send.lend((8, 4), torch.float32)
    loan.copy_(torch.arange(32).view(8, 4))
    result = pair.pass_on(loan[:, 1])
    assert result.tolist() == [1.0 + 4 * row for row in range(8)]
    assert pair.copied == [32]


def test_a_copied_tensor_does_not_change_with_its_original(pair: Pair) -> None:
    """After export the sender may overwrite a tensor that lay outside of the arena."""
    source = torch.arange(4)
    result = pair.pass_on(source)
    source.zero_()
    assert result.tolist() == [0, 1, 2, 3]
    assert pair.copied == [32]


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
    assert pair.copied == [source.numel() * source.element_size()]


def test_a_conjugate_view_of_a_loan_is_resolved(pair: Pair) -> None:
    """A lazily conjugated or negated view of a loan shares its bytes, but not its values: it is copied."""
    loan = pair.send.lend((2,), torch.complex64)
    loan.copy_(torch.tensor([1 + 2j, 3 - 4j]))
    assert pair.pass_on(loan.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert pair.pass_on(loan.conj().imag).tolist() == [-2.0, 4.0]
    assert loan.tolist() == [1 + 2j, 3 - 4j]


def test_a_zero_dimensional_loan_is_a_tensor(pair: Pair) -> None:
    """The shape () is one element; it can be lent, filled and sent without a copy."""
    loan = pair.send.lend((), torch.float64)
    loan.fill_(2.5)
    result = pair.pass_on(loan)
    assert result.shape == ()
    assert result.item() == 2.5
    assert pair.copied == []


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 5)])
def test_an_empty_tensor_keeps_its_shape_and_takes_no_block(pair: Pair, shape: tuple[int, ...]) -> None:
    """Nothing to copy, nothing to release, and room for it even in a full arena."""
    full = pair.send.lend((pair.data_bytes,), torch.uint8)
    for sent in (pair.send.lend(shape, torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16)):
        result = pair.pass_on(sent)
        assert result.shape == shape
        assert result.dtype == torch.bfloat16
    assert pair.pass_on(np.empty(shape, dtype=np.int16)).shape == shape
    assert len(pair.receive) == 0
    assert pair.copied == []
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
        pair.send.lend(shape, dtype)
    assert pair.is_free()


def test_sixteen_dimensions_are_sent(pair: Pair) -> None:
    """16 dimensions are the most that a descriptor takes."""
    source = torch.arange(8.0).view((1,) * 13 + (2, 2, 2))
    assert torch.equal(pair.pass_on(source), source)


@pytest.mark.parametrize("kind", ["in the arena", "empty"])
def test_more_than_sixteen_dimensions_are_refused_wherever_they_lie(pair: Pair, kind: str) -> None:
    """More than 16 dimensions are the caller's error also where nothing is copied."""
    sources = {
        "in the arena": pair.send.lend((1,), torch.float32).view((1,) * 17),
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


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(3, dtype=torch.bfloat16), np.ones(3)[::-1]])
def test_a_copy_that_is_interrupted_leaves_no_block(
    monkeypatch: pytest.MonkeyPatch, value: torch.Tensor | np.ndarray
) -> None:
    """Where copying a tensor in doesn't come to an end, its room can be had again, and no copy was counted.

    The compiled twin copies tensors without running Python code: it can't be interrupted there.
    """
    pair = Pair(core=python_twin)

    def interrupted(_target: np.ndarray, _source: np.ndarray) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.pass_on(value)
    assert pair.is_free()
    assert pair.copied == []
    pair.close()
