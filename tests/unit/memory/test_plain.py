"""Shapes, tensors and arrays that are no plain data: refused by name, before anything is claimed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

from shmtransport.core import python_twin
from shmtransport.errors import LocalProtocolError
from tests.support.arenas import Pair


@pytest.mark.parametrize(
    "shape",
    [
        (3.0,),
        (2, 3.5),
        ("3",),
        (None,),
        2.0,
        None,
        ([1],),
        (1 + 0j,),
        (10**5000, 0),
        (10**400,),
        (2**80,),
        (2**62, 2**30),
        (-1,),
    ],
    ids=lambda shape: str(shape)[:16] if shape != (10**5000, 0) else "5000 digits",
)
def test_a_shape_that_none_can_have_is_refused_and_breaks_nothing(pair: Pair, shape: Any) -> None:
    """Whatever stands in a shape: the caller's error, and the next claim is as good as the first."""
    for _ in range(3):
        with pytest.raises(LocalProtocolError, match="shape"):
            pair.send.lend(shape, torch.float32)
        assert pair.send.lend((3,), torch.float32).fill_(1.0).tolist() == [1.0] * 3
    assert pair.is_free()


@pytest.mark.parametrize("shape", [torch.Size([2, 3]), [2, 3], np.array([2, 3]), (np.int64(2), torch.tensor(3))])
def test_a_shape_of_any_integers_is_taken(pair: Pair, shape: Any) -> None:
    """Python's, numpy's and torch's integers, in any sequence."""
    assert pair.send.lend(shape, torch.float32).shape == (2, 3)


_NO_DTYPES = [float, "float31", "", "torch", None, 3, [], torch.qint8, np.dtype("M8[s]"), np.object_]


@pytest.mark.parametrize("dtype", _NO_DTYPES)
def test_a_dtype_that_can_not_be_sent_is_refused(pair: Pair, dtype: Any) -> None:
    """Also one that is no dtype at all; Python's own types mean different things to torch and numpy."""
    with pytest.raises(LocalProtocolError, match="known dtypes: torch"):
        pair.send.lend((3,), dtype)
    assert pair.is_free()


def test_a_loan_that_can_not_be_made_gives_its_block_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails after the claim, the claim is rolled back; of the compiled twin, see ``core/test_tensors``."""
    pair = Pair(core=python_twin)

    def out_of_memory(*_arguments: Any) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("shmtransport.memory.views._from_numpy", out_of_memory)
        with pytest.raises(MemoryError):
            pair.send.lend((3,), torch.float32)
    assert pair.is_free()
    pair.close()


class _Scaled(torch.Tensor):
    """Its values are not its bytes."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class _Named(torch.Tensor):
    """Only its name differs."""


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def _freed(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def _in_vmap(check: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.vmap(check)(torch.ones(2, 3))


def _in_grad(check: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.func.grad(lambda x: check(x).sum())(torch.ones(3))


def _in_functionalize(check: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.func.functionalize(check)(torch.ones(3))


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_fake, "FakeTensor"),
        (lambda: masked_tensor(torch.ones(3), torch.tensor([True, False, True])), "MaskedTensor"),
        (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "TwoTensor"),
        (lambda: torch.ones(3).as_subclass(_Scaled), "_Scaled"),
        (torch.nn.UninitializedParameter, "UninitializedParameter"),
        (lambda: torch._efficientzerotensor((3,)), "without memory"),
        (lambda: torch._to_functional_tensor(torch.ones(3)), "without memory"),
        (lambda: _freed(torch.ones(3), 0), "0 of the 12 bytes"),
        (lambda: _freed(torch.ones(3)[1:], 8), "8 of the 12 bytes"),
        (lambda: _freed(torch.ones(4)[::2], 8), "8 of the 12 bytes"),
        (lambda: torch.eye(3).to_mkldnn(), "dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "dense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_is_more_or_less_than_its_bytes_is_refused_by_name(
    pair: Pair, make: Callable[[], torch.Tensor], named: str
) -> None:
    """Subclasses that change what torch does, and tensors without the memory for their shape; nothing is claimed."""
    with pytest.raises(LocalProtocolError, match=named):
        pair.send.export(make())
    assert pair.is_free()


@pytest.mark.parametrize("transform", [_in_vmap, _in_grad, _in_functionalize])
def test_a_tensor_inside_of_a_transform_is_refused(
    pair: Pair, transform: Callable[[Callable[[torch.Tensor], torch.Tensor]], None]
) -> None:
    """What vmap, grad and functionalize hand to a function has no memory of its own."""

    def check(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(LocalProtocolError, match="without memory of its own"):
            pair.send.export(x)
        return x

    transform(check)
    assert pair.is_free()


@pytest.mark.parametrize("make", [torch.nn.Parameter, torch.nn.Buffer, lambda x: x.as_subclass(_Named)])
def test_a_subclass_that_changes_nothing_is_sent(pair: Pair, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Parameters, buffers and subclasses of another name alone are plain data."""
    result = pair.pass_on(make(torch.arange(3.0)))
    assert type(result) is torch.Tensor
    assert result.tolist() == [0.0, 1.0, 2.0]


def test_a_copy_that_fails_is_the_callers_error(pair: Pair) -> None:
    """Copying runs other libraries' code, which may raise anything; nothing stays claimed."""
    source = torch.ones(6)[::2]
    with FakeTensorMode(), pytest.raises(LocalProtocolError, match="content can't be copied"):
        pair.send.export(source)
    assert pair.is_free()


class _Metres(np.ndarray):
    """An array with a unit."""

    def __array_ufunc__(self, *_arguments: Any, **_keywords: Any) -> Any:
        return NotImplemented


def test_an_array_that_is_more_than_its_bytes_is_refused(pair: Pair) -> None:
    """A unit would be lost; a matrix is just an array."""
    with pytest.raises(LocalProtocolError, match="_Metres"):
        pair.send.export_array(np.ones(3).view(_Metres))
    assert pair.pass_on(np.ones(3).view(np.recarray)).tolist() == [1.0] * 3
    assert pair.is_free()


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), "float32", "torch.float32", torch.float32])
@pytest.mark.parametrize(
    ("shape", "sizes"), [(5, (5,)), (np.int64(5), (5,)), ([2, 3], (2, 3)), (torch.Size([2]), (2,))]
)
def test_shapes_and_dtypes_are_taken_as_users_write_them(pair: Pair, shape: Any, sizes: Any, dtype: Any) -> None:
    """An integer is the shape of one dimension; dtypes are torch's, numpy's, or the name of one."""
    loan = pair.send.lend(shape, dtype)
    assert (tuple(loan.shape), loan.dtype) == (sizes, torch.float32)
