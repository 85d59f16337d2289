"""numpy arrays of the dtypes that ml_dtypes adds: sent as what they are where torch has them, else refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport import Client, LocalProtocolError
from shmtransport.protocol.values import pack, unpack
from tests.support.arenas import Pair

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

_IN_TORCH = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_NOT_IN_TORCH = ("float8_e4m3b11fnuz", "float8_e3m4", "float8_e4m3", "float4_e2m1fn", "float6_e2m3fn", "int4", "uint2")


def _bits(count: int, nbytes: int) -> np.ndarray[Any, Any]:
    return np.arange(1, count * nbytes + 1, dtype=np.uint8).view(f"u{nbytes}")


@pytest.mark.parametrize("name", _IN_TORCH)
@pytest.mark.parametrize(
    "change",
    [
        lambda array: array,
        lambda array: array[::2],
        lambda array: array[::-1],
        lambda array: array.reshape(2, 4).T,
        lambda array: array.astype(array.dtype.newbyteorder()),
        lambda array: array[:0],
    ],
    ids=["plain", "strided", "reversed", "transposed", "other byte order", "empty"],
)
def test_an_array_arrives_as_the_tensor_of_the_same_name_and_bits(
    pair: Pair, name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> None:
    """Whatever its strides and byte order; numpy itself may not have the dtype at the other end."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    plain = _bits(8, dtype.itemsize).view(dtype)
    array = change(plain)
    frozen = array.copy()
    frozen.flags.writeable = False
    for value in (array, frozen):
        tensors: list[torch.Tensor] = []

        def take(part: Any, tensors: list[torch.Tensor] = tensors) -> int:
            tensors.append(pair.pass_on(part))
            return 0

        arrived = unpack(pack(value, take), tensors)
        assert isinstance(arrived, torch.Tensor)
        assert arrived.dtype is getattr(torch, name)
        assert arrived.shape == array.shape
        native = array.astype(dtype).view(f"u{dtype.itemsize}")
        assert np.array_equal(arrived.view(torch.uint8 if dtype.itemsize == 1 else torch.uint16).numpy(), native)


@pytest.mark.parametrize("name", _NOT_IN_TORCH)
def test_an_array_that_torch_has_no_dtype_for_is_refused_by_name(pair: Pair, name: str) -> None:
    """The caller's error, before anything is claimed."""
    if not hasattr(ml_dtypes, name):
        pytest.skip(f"this ml_dtypes has no {name}")
    with pytest.raises(LocalProtocolError, match=f"{name} can't be sent"):
        pair.send.export_array(np.zeros(4, getattr(ml_dtypes, name)))
    assert pair.is_free()


def test_a_call_takes_and_returns_them(serve: Callable[..., object], address: str) -> None:
    """Arrays in arguments and results, also inside of other values."""
    serve(double=lambda values: {"twice": values["x"] * 2, "array": np.ones(2, ml_dtypes.bfloat16)})
    with Client(address) as client:
        result = client.call("double", {"x": np.full(4, 1.5, ml_dtypes.bfloat16)})
        assert torch.equal(result["twice"], torch.full((4,), 3.0, dtype=torch.bfloat16))
        assert torch.equal(result["array"], torch.ones(2, dtype=torch.bfloat16))
