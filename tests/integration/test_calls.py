"""Calls between a client and a server: what travels, and what can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport import Client, LocalProtocolError
from shmtransport.memory.dtypes import TABLE
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import Serve


def test_a_call_returns_what_the_handler_returns(shared_server: str, channel: ChannelKind) -> None:
    """One call, one result: a tensor computed by another process."""
    with Client(shared_server, channel=channel) as client:
        x = torch.arange(6, dtype=torch.float32).view(2, 3)
        assert torch.equal(client.call("double", x), x * 2)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        2**64 - 1,
        0.1,
        float("inf"),
        "",
        "Grüße, 世界",
        b"",
        b"\x00\xff",
        [],
        (),
        {},
        [1, [2, (3, {"a": (4,)})]],
        ((), [()], {"": ()}),
        {"text": 1, 7: "a key that is an integer", "nested": {"deep": [None]}},
    ],
    ids=repr,
)
def test_plain_values_arrive_as_they_were(shared_server: str, value: Any, channel: ChannelKind) -> None:
    """Value and type survive: a tuple stays a tuple, bytes stay bytes, True is not 1."""
    with Client(shared_server, channel=channel) as client:
        for result in (client.call("echo", value), client.call("echo", value=[value])[0]):
            assert result == value
            assert type(result) is type(value)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_dtype_crosses_bit_for_bit(shared_server: str, row: Any, channel: ChannelKind) -> None:
    """All dtypes of the table, any bit pattern, 0-d and empty and 16-dimensional tensors too."""
    generator = torch.Generator().manual_seed(1)
    high = 2 if row.name == "bool" else 256
    raw = torch.randint(0, high, (24 * row.itemsize,), dtype=torch.uint8, generator=generator)
    x = raw.view(row.torch).view(2, 3, 4)
    cases = [x, x[0, 0, 0], x[:, :, 0], x[:0], x.view(2, 3, 4, *([1] * 13)), torch.empty((0, 5), dtype=row.torch)]
    with Client(shared_server, channel=channel) as client:
        for sent in cases:
            received = client.call("echo", sent)
            assert received.dtype == sent.dtype
            assert received.shape == sent.shape
            sent_bytes = sent.contiguous().view(-1).view(torch.uint8)
            assert torch.equal(received.contiguous().view(-1).view(torch.uint8), sent_bytes)


def test_tensors_may_stand_anywhere_in_nested_structures(shared_server: str, channel: ChannelKind) -> None:
    """Lists, tuples and dicts keep their shape around the tensors in them; one tensor may stand there twice."""
    x, y = torch.arange(4.0), np.arange(3)
    with Client(shared_server, channel=channel) as client:
        result = client.call("echo", {"a": [x, (y, {"b": x})], "c": "plain", "d": torch.empty(0)})
    assert torch.equal(result["a"][0], x)
    inner = result["a"][1]
    assert type(inner) is tuple
    assert np.array_equal(inner[0], y)
    assert torch.equal(inner[1]["b"], x)
    assert result["c"] == "plain"
    assert result["d"].shape == (0,)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(6.0)[::-1],
        np.arange(6.0)[::2],
        np.arange(3, dtype=">i4"),
        np.array(2.5, dtype=np.float32),
        np.empty((0, 3), dtype=np.uint8),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.arange(1.0)[::-1],
        np.arange(4.0).reshape(2, 2)[:1][::-1],
        np.broadcast_to(np.arange(3.0), (2, 3)),
    ],
    ids=[
        "contiguous",
        "transposed",
        "reversed",
        "strided",
        "big_endian",
        "0d",
        "empty",
        "bool",
        "complex",
        "reversed_single",
        "reversed_row",
        "broadcast",
    ],
)
def test_numpy_in_is_numpy_out_and_read_only(
    shared_server: str, array: np.ndarray[Any, Any], channel: ChannelKind
) -> None:
    """Arrays of any strides and byte order arrive as arrays with the same values; what is borrowed can't be written."""
    with Client(shared_server, channel=channel) as client:
        result = client.call("echo", array)
    assert isinstance(result, np.ndarray)
    assert result.dtype == array.dtype.newbyteorder("=")
    assert result.shape == array.shape
    assert np.array_equal(result, array)
    assert not result.flags.writeable


def test_a_read_only_array_can_be_sent(shared_server: str, channel: ChannelKind) -> None:
    """Also one that numpy guards against writing, and a result sent back."""
    array = np.arange(5.0)
    array.flags.writeable = False
    with Client(shared_server, channel=channel) as client:
        again = client.call("echo", client.call("echo", array))
    assert np.array_equal(again, array)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).view(3, 4).T,
        lambda: torch.arange(12.0)[::3],
        lambda: torch.arange(3.0).expand(4, 3),
        lambda: torch.ones(3, requires_grad=True),
        lambda: torch.nn.Parameter(torch.ones(3)),
        lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
        lambda: torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        lambda: torch.arange(8.0)[1:],
    ],
    ids=["transposed", "strided", "expanded", "requires_grad", "parameter", "conjugate", "negative_bit", "slice"],
)
def test_tensors_of_any_strides_arrive_as_plain_contiguous_values(
    shared_server: str, make: Callable[[], torch.Tensor], channel: ChannelKind
) -> None:
    """What isn't contiguous, or is a lazy conjugate, or has a gradient, is made plain by the one copy."""
    x = make()
    with Client(shared_server, channel=channel) as client:
        result = client.call("echo", x)
    assert result.is_contiguous()
    assert not result.requires_grad
    assert torch.equal(result, x.detach().resolve_conj().resolve_neg())


def test_positional_and_keyword_arguments_reach_their_parameters(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """Also keywords that are called like the interface's own: method, self, timeout_s."""

    def take(*arguments: Any, **keywords: Any) -> list[Any]:
        return [list(arguments), keywords]

    serve(take=take)
    with Client(address, channel=channel) as client:
        assert client.call("take", 1, 2, layer=3) == [[1, 2], {"layer": 3}]
        assert client.call("take", method="m", self="s", timeout_s=1) == [
            [],
            {"method": "m", "self": "s", "timeout_s": 1},
        ]


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, 1 + 2j, {"x": object()}, {(1, 2): 3}, 2**64, "\ud800", {None: 1}],
    ids=["object", "set", "complex", "nested", "tuple_key", "65_bits", "surrogate", "None_key"],
)
def test_what_cant_be_sent_is_a_local_error_and_costs_nothing(
    shared_server: str, value: Any, channel: ChannelKind
) -> None:
    """The error is the sender's own, nothing is sent, no block stays held, the connection goes on."""
    with Client(shared_server, channel=channel, arena_bytes=64 * 1024) as client:
        for _ in range(40):  # 40 × 4 KiB would fill the arena if the tensor before the bad value stayed held
            with pytest.raises(LocalProtocolError):
                client.call("echo", [torch.zeros(1024), value])
        assert client.statistics().calls == 0
        assert client.call("echo", 1) == 1


@pytest.mark.parametrize(
    "make",
    [lambda: torch.eye(3).to_sparse(), lambda: torch.empty(3, device="meta"), lambda: np.array(["text"], dtype=object)],
    ids=["sparse", "meta", "object_array"],
)
def test_tensors_without_plain_memory_are_a_local_error(
    shared_server: str, make: Callable[[], Any], channel: ChannelKind
) -> None:
    """Sparse, meta and object arrays are refused by name of the reason, never sent as garbage."""
    with Client(shared_server, channel=channel) as client:
        with pytest.raises(LocalProtocolError):
            client.call("echo", make())
        assert client.call("echo", 1) == 1
