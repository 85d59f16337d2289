"""Calls between a client and a server: what travels, what is copied, what fails and how."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from shmtransport import (
    ArenaFull,
    CallTimeout,
    Client,
    Closed,
    LocalProtocolError,
    MessageTooLarge,
    RemoteError,
    Server,
    TensorTooLarge,
    TransportError,
)
from shmtransport.dtypes import TABLE
from tests.conftest import ROOT, Process

MIB = 1 << 20
Serve = Callable[..., Server]


def echo(value: Any = None) -> Any:
    return value


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server in a process of its own, shared by this module's tests."""
    address = f"ipc://{tmp_path_factory.mktemp('calls')}/server.ipc"
    process = Process(ROOT / "tests/scripts/server.py", address)
    process.wait_until_ready()
    yield address
    process.end()


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# What travels


def test_a_call_returns_what_the_handler_returns(worker: str) -> None:
    """One call, one result: a tensor computed by another process."""
    with Client(worker) as client:
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
def test_plain_values_arrive_as_they_were(worker: str, value: Any) -> None:
    """Value and type survive: a tuple stays a tuple, bytes stay bytes, True is not 1."""
    with Client(worker) as client:
        for result in (client.call("echo", value), client.call("echo", value=[value])[0]):
            assert result == value
            assert type(result) is type(value)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_dtype_crosses_bit_for_bit(worker: str, row: Any) -> None:
    """All dtypes of the table, any bit pattern, 0-d and empty and 16-dimensional tensors too."""
    generator = torch.Generator().manual_seed(1)
    high = 2 if row.name == "bool" else 256
    raw = torch.randint(0, high, (24 * row.itemsize,), dtype=torch.uint8, generator=generator)
    x = raw.view(row.torch).view(2, 3, 4)
    cases = [x, x[0, 0, 0], x[:, :, 0], x[:0], x.view(2, 3, 4, *([1] * 13)), torch.empty((0, 5), dtype=row.torch)]
    with Client(worker) as client:
        for sent in cases:
            received = client.call("echo", sent)
            assert received.dtype == sent.dtype
            assert received.shape == sent.shape
            sent_bytes = sent.contiguous().view(-1).view(torch.uint8)
            assert torch.equal(received.contiguous().view(-1).view(torch.uint8), sent_bytes)


def test_tensors_may_stand_anywhere_in_nested_structures(worker: str) -> None:
    """Lists, tuples and dicts keep their shape around the tensors in them; one tensor may stand there twice."""
    x, y = torch.arange(4.0), np.arange(3)
    with Client(worker) as client:
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
def test_numpy_in_is_numpy_out_and_read_only(worker: str, array: np.ndarray[Any, Any]) -> None:
    """Arrays of any strides and byte order arrive as arrays with the same values; what is borrowed can't be written."""
    with Client(worker) as client:
        result = client.call("echo", array)
    assert isinstance(result, np.ndarray)
    assert result.dtype == array.dtype.newbyteorder("=")
    assert result.shape == array.shape
    assert np.array_equal(result, array)
    assert not result.flags.writeable


def test_a_read_only_array_can_be_sent(worker: str) -> None:
    """Also one that numpy guards against writing, and a result sent back."""
    array = np.arange(5.0)
    array.flags.writeable = False
    with Client(worker) as client:
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
    worker: str, make: Callable[[], torch.Tensor]
) -> None:
    """What isn't contiguous, or is a lazy conjugate, or has a gradient, is made plain by the one copy."""
    x = make()
    with Client(worker) as client:
        result = client.call("echo", x)
    assert result.is_contiguous()
    assert not result.requires_grad
    assert torch.equal(result, x.detach().resolve_conj().resolve_neg())


def test_positional_and_keyword_arguments_reach_their_parameters(serve: Serve, address: str) -> None:
    """Also keywords that are called like the interface's own: method, self, timeout_s."""

    def take(*arguments: Any, **keywords: Any) -> list[Any]:
        return [list(arguments), keywords]

    serve(take=take)
    with Client(address) as client:
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
def test_what_cant_be_sent_is_a_local_error_and_costs_nothing(worker: str, value: Any) -> None:
    """The error is the sender's own, nothing is sent, no block stays held, the connection goes on."""
    with Client(worker, arena_bytes=64 * 1024) as client:
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
def test_tensors_without_plain_memory_are_a_local_error(worker: str, make: Callable[[], Any]) -> None:
    """Sparse, meta and object arrays are refused by name of the reason, never sent as garbage."""
    with Client(worker) as client:
        with pytest.raises(LocalProtocolError):
            client.call("echo", make())
        assert client.call("echo", 1) == 1


# Several calls at once


def test_several_calls_may_be_in_flight(worker: str) -> None:
    """Each pending reply gets its own result."""
    with Client(worker) as client:
        pending = [client.submit("double", torch.full((100,), float(i))) for i in range(50)]
        for i, reply in enumerate(pending):
            assert torch.equal(reply.result(), torch.full((100,), 2.0 * i))


def test_results_may_be_asked_for_in_any_order_and_more_than_once(worker: str) -> None:
    """Last first; and asking again gives the same result."""
    with Client(worker) as client:
        pending = [client.submit("echo", i) for i in range(20)]
        assert [reply.result() for reply in reversed(pending)] == list(reversed(range(20)))
        assert pending[3].result() == 3
        assert all(reply.done for reply in pending)


def test_a_failed_call_fails_alone(worker: str) -> None:
    """Of several calls in flight only that one raises."""
    with Client(worker) as client:
        good, bad, after = client.submit("echo", 1), client.submit("no such"), client.submit("echo", 2)
        assert after.result() == 2
        with pytest.raises(LocalProtocolError):
            bad.result()
        assert good.result() == 1


def test_pending_replies_that_nobody_keeps_release_their_results(worker: str) -> None:
    """A reply that is never asked for holds no room once it is taken off the channel."""
    with Client(worker, arena_bytes=MIB) as client:
        for i in range(40):
            client.submit("fill", 64 * 1024, float(i))  # 256 KiB of result, four of them fill the arena
            assert client.call("echo", i) == i


def test_one_client_may_be_used_by_several_threads(worker: str) -> None:
    """Every thread gets the results of its own calls."""
    with Client(worker) as client:

        def work(number: int) -> bool:
            return all(
                torch.equal(client.call("double", torch.full((64,), float(number))), torch.full((64,), 2.0 * number))
                for _ in range(50)
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


def test_several_clients_at_once_never_see_each_others_data(worker: str) -> None:
    """Four clients, each with its own values, many rounds in small arenas, all contents checked."""

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        with Client(worker, arena_bytes=256 * 1024) as client:
            for _ in range(100):
                x = torch.randint(0, 1 << 20, (int(torch.randint(1, 5000, (1,), generator=generator)),)).float()
                x += number
                expected = x * 2
                pending = client.submit("double", x)
                loan = client.empty(x.shape, x.dtype).copy_(x)
                second = client.submit("double", loan)
                assert torch.equal(second.result(), expected)
                assert torch.equal(pending.result(), expected)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result()


def test_client_processes_at_once_never_see_each_others_data(serve: Serve, address: str, spawn: Any) -> None:
    """The same with processes: each checks its own results and says so."""
    server = serve(double=lambda x: x * 2)
    processes = [spawn(ROOT / "tests/scripts/checking_client.py", address, str(number)) for number in range(2)]
    for process in processes:
        assert process.readline() == "all results were right"
        assert process.wait() == 0
    assert server.statistics().calls == 2 * 100
    assert server.statistics().failures == 0


# Copies and room


def test_results_made_by_empty_are_not_copied(serve: Serve, address: str) -> None:
    """Nor slices and views of them, nor in nested structures, nor one sent twice."""
    server: Server

    def compute(n: int) -> list[torch.Tensor]:
        out = server.empty((n, 4), torch.float32).fill_(n)
        return [out, out[1:], out.view(-1), out]

    server = serve(compute=compute)
    with Client(address) as client:
        for n in range(2, 20):
            first, rest, flat, again = client.call("compute", n)
            assert torch.equal(first, torch.full((n, 4), float(n)))
            assert torch.equal(rest, first[1:])
            assert torch.equal(flat, first.view(-1))
            assert torch.equal(again, first)
    assert server.statistics().bytes_copied == 0
    assert server.statistics().tensors_copied == 0


def test_arguments_made_by_empty_are_not_copied(worker: str) -> None:
    """A loan is sent by descriptor, whole, sliced, viewed or through numpy; and may be sent again."""
    with Client(worker) as client:
        x = client.empty((8, 16), torch.float32).fill_(1)
        assert client.call("double", x).sum() == 256
        assert client.call("double", x[2:4]).sum() == 64
        assert client.call("double", x.view(-1)).sum() == 256
        assert client.call("double", x.view(torch.int32)).shape == (8, 16)
        assert client.call("echo", x.numpy()).sum() == 128
        assert client.statistics().bytes_copied == 0
        client.call("double", x.T)
        assert client.statistics().bytes_copied == 8 * 16 * 4, "a transposed loan is copied once"


def test_the_handler_sees_the_callers_memory_itself(serve: Serve, address: str) -> None:
    """Zero copies on the way: the server's view and the client's loan are one memory."""
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> None:
        kept.append(x)

    serve(keep=keep)
    with Client(address) as client:
        x = client.empty((4,), torch.float32).fill_(1)
        client.call("keep", x)
        x[2] = 5
        assert kept[0].tolist() == [1, 1, 5, 1]
        kept.clear()


def test_many_calls_wrap_a_small_arena_with_every_byte_right(worker: str) -> None:
    """500 calls of changing sizes go round both 64 KiB arenas many times; some results are held for a while."""
    generator = torch.Generator().manual_seed(7)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    sent = 0
    with Client(worker, arena_bytes=64 * 1024) as client:
        for i in range(500):
            x = torch.randn(int(torch.randint(1, 1500, (1,), generator=generator)), generator=generator)
            sent += x.nbytes
            y = client.call("double", x)
            assert torch.equal(y, x * 2), f"call {i}"
            if i % 7 == 0:
                held.append((y, x * 2))
            if len(held) > 3:
                held.pop(i % 3)
            assert all(torch.equal(a, b) for a, b in held), f"a held result changed by call {i}"
    assert sent > 20 * 64 * 1024


def test_a_calls_arguments_are_free_again_when_its_result_is_there(worker: str) -> None:
    """An arena with room for one argument serves any number of calls in turn: no race with the server's release."""
    with Client(worker, arena_bytes=64 * 1024, reply_arena_bytes=MIB) as client:
        x = torch.ones(10 * 1024)  # 40 KiB of 64
        for _ in range(100):
            assert client.call("echo", [x.shape[0], x])[0] == 10 * 1024


def test_held_results_fill_the_arena_and_dropping_them_makes_room(worker: str) -> None:
    """ArenaFull says count, limit and remedy; the connection goes on, and recovers once results are dropped."""
    with Client(worker, arena_bytes=MIB) as client:
        held = [client.call("fill", 64 * 1024, float(i)) for i in range(4)]
        with pytest.raises(ArenaFull, match=r"requested 256\.0 KiB.*arena is 1\.0 MiB.*release results"):
            client.call("fill", 64 * 1024, 9.0)
        assert [int(result[0]) for result in held] == [0, 1, 2, 3]
        part = held.pop(1)[1000:1001]
        with pytest.raises(ArenaFull):
            client.call("fill", 64 * 1024, 9.0)
        assert part.item() == 1.0, "a slice keeps its block"
        del part
        assert client.call("fill", 64 * 1024, 9.0)[5] == 9.0
        held.clear()
        assert torch.equal(client.call("fill", 200 * 1024, 3.0), torch.full((200 * 1024,), 3.0))


def test_loans_fill_the_arena_and_dropping_them_makes_room(worker: str) -> None:
    """The same for what this side holds; the figures are of this arena."""
    with Client(worker, arena_bytes=MIB) as client:
        loans = [client.empty((256 * 1024,), torch.uint8) for _ in range(4)]
        with pytest.raises(ArenaFull, match=r"4 blocks held"):
            client.empty((1,), torch.uint8)
        with pytest.raises(ArenaFull):
            client.call("echo", torch.zeros(1))
        loans.pop(2)
        assert client.empty((256 * 1024,), torch.uint8).numel() == 256 * 1024
        assert client.call("echo", torch.ones(3)).tolist() == [1, 1, 1]


def test_a_tensor_larger_than_the_arena_is_refused_with_figures(worker: str) -> None:
    """TensorTooLarge: waiting can't help, and the message says what would; on either side of the call."""
    with Client(worker, arena_bytes=MIB) as client:
        with pytest.raises(TensorTooLarge, match=r"2\.0 MiB.*1\.0 MiB.*raise arena_bytes"):
            client.call("echo", torch.zeros(2 * MIB, dtype=torch.uint8))
        with pytest.raises(TensorTooLarge, match=r"2\.0 MiB.*1\.0 MiB"):
            client.empty((2 * MIB,), torch.uint8)
        with pytest.raises(TensorTooLarge, match=r"on the server.*2\.0 MiB.*1\.0 MiB"):
            client.call("fill", MIB // 2, 1.0)
        assert client.call("fill", MIB // 4, 1.0).numel() == MIB // 4, "the whole arena can be used"


def test_a_message_of_too_many_plain_bytes_is_refused_with_figures(serve: Serve, address: str) -> None:
    """MessageTooLarge on either side; nothing was sent, no block stays held, the connection goes on."""
    serve(echo=echo, large=lambda: "x" * 100_000)
    with Client(address, arena_bytes=64 * 1024) as client:
        for _ in range(40):
            with pytest.raises(MessageTooLarge, match=r"\d+ bytes; the limit is 65536"):
                client.call("echo", torch.zeros(1024), b"x" * 70_000)
        with pytest.raises(MessageTooLarge, match="on the server"):
            client.call("large")
        assert client.call("echo", "x" * 60_000) == "x" * 60_000


def test_both_sides_can_raise_the_message_limit(serve: Serve, address: str) -> None:
    """With max_message_bytes raised on both sides larger messages go, both ways; raised on one the error stays."""
    serve({"max_message_bytes": MIB}, echo=echo, large=lambda: "x" * 100_000)
    with Client(address, timeout_s=5.0, max_message_bytes=MIB) as client:
        assert client.call("echo", b"x" * 500_000) == b"x" * 500_000
    with Client(address, timeout_s=5.0) as client:
        with pytest.raises(MessageTooLarge):
            client.call("echo", b"x" * 500_000)
        with pytest.raises(MessageTooLarge, match="on the server"):
            client.call("large")
        assert client.call("echo", 1) == 1


def test_more_tensors_than_a_message_takes_is_a_local_error(worker: str) -> None:
    """And the blocks of those before it are free again."""
    with Client(worker, arena_bytes=256 * 1024) as client:
        for _ in range(4):
            with pytest.raises(LocalProtocolError, match="1024 tensors"):
                client.call("echo", [torch.zeros(1) for _ in range(1025)])
        assert client.call("echo", torch.ones(2)).tolist() == [1, 1]


# Failures


class DeliberateError(Exception):
    """Raised by a handler on purpose."""


def test_a_handlers_exception_arrives_as_type_and_message_only(serve: Serve, address: str) -> None:
    """RemoteError names the class and the text; no traceback, no file, no line travels."""

    def fail(text: str) -> None:
        raise DeliberateError(text)

    serve(fail=fail, echo=echo)
    with Client(address) as client:
        with pytest.raises(RemoteError) as caught:
            client.call("fail", "layer 3 has no weights")
        assert caught.value.type_name == "DeliberateError"
        assert caught.value.message == "layer 3 has no weights"
        assert "Traceback" not in str(caught.value)
        assert os.path.dirname(__file__) not in str(caught.value)
        assert ".py" not in str(caught.value)
        assert client.call("echo", 1) == 1


def test_a_missing_file_on_the_server_does_not_tell_its_path(serve: Serve, address: str) -> None:
    """An OSError's file names stay on the server."""
    serve(read=lambda: open("/secret/place/weights.bin").close())
    with Client(address) as client, pytest.raises(RemoteError, match="No such file") as caught:
        client.call("read")
    assert caught.value.type_name == "FileNotFoundError"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [TimeoutError("the GPU took too long"), CallTimeout("no reply from the next server within 5 s")], ids=repr
)
def test_a_handlers_own_words_arrive_whatever_the_class(serve: Serve, address: str, error: Exception) -> None:
    """Errors that merely derive from OSError and name no file keep their message."""

    def fail() -> None:
        raise error

    serve(fail=fail)
    with Client(address) as client, pytest.raises(RemoteError) as caught:
        client.call("fail")
    assert (caught.value.type_name, caught.value.message) == (type(error).__name__, str(error))


class UnprintableError(Exception):
    """An exception that can't be turned into text."""

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    "error",
    [DeliberateError("\ud800 is no character"), DeliberateError("x" * 100_000), UnprintableError()],
    ids=["surrogate", "long", "unprintable"],
)
def test_no_exception_of_a_handler_can_end_the_server(serve: Serve, address: str, error: Exception) -> None:
    """However odd its text is, the caller gets an error and the server serves on."""

    def fail() -> None:
        raise error

    serve(fail=fail, echo=echo)
    with Client(address, timeout_s=5.0) as client:
        with pytest.raises(RemoteError):
            client.call("fail")
        assert client.call("echo", 1) == 1


def test_an_error_longer_than_the_message_limit_does_not_end_the_server(serve: Serve, address: str) -> None:
    """A server with a small max_message_bytes cuts the text; it never fails to report a failure."""

    def fail() -> None:
        raise DeliberateError("x" * 4000)

    serve({"max_message_bytes": 1024}, fail=fail, echo=echo)
    with Client(address, timeout_s=5.0) as client:
        with pytest.raises(TransportError):
            client.call("fail")
        assert client.call("echo", 1) == 1


def test_an_unknown_method_is_named_with_those_there_are(worker: str) -> None:
    """LocalProtocolError: it was this side that asked for it."""
    with Client(worker) as client, pytest.raises(LocalProtocolError, match=r"'doubel'; there are: double, echo"):
        client.call("doubel")


@pytest.mark.parametrize(("arguments", "keywords"), [((), {}), ((1, 2), {}), ((1,), {"y": 2})])
def test_wrong_arguments_are_the_handlers_type_error(worker: str, arguments: Any, keywords: Any) -> None:
    """Python's own message arrives, and the server serves on."""
    with Client(worker) as client:
        with pytest.raises(RemoteError, match="argument") as caught:
            client.call("sleep", *arguments, **keywords)
        assert caught.value.type_name == "TypeError"
        assert client.call("echo", 1) == 1


def test_a_result_that_cant_be_sent_fails_the_call_only(serve: Serve, address: str) -> None:
    """The caller gets the reason; blocks that the result had already taken are free again."""
    server: Server

    def bad() -> list[object]:
        return [server.empty((1024,), torch.float32), object()]

    server = serve(bad=bad, echo=echo)
    with Client(address, arena_bytes=64 * 1024) as client:
        for _ in range(40):
            with pytest.raises(LocalProtocolError, match="type object"):
                client.call("bad")
        assert client.call("echo", 1) == 1


def test_after_a_timeout_the_connection_works_and_the_late_result_is_released(serve: Serve, address: str) -> None:
    """CallTimeout ends one call: the late reply is thrown away and its block is free again."""
    server: Server
    go = threading.Event()

    def slow() -> torch.Tensor:
        go.wait(10)
        go.clear()
        return server.empty((48 * 1024,), torch.uint8)  # of a 64 KiB arena

    server = serve(slow=slow, echo=echo)
    with Client(address, arena_bytes=64 * 1024) as client:
        for _ in range(3):
            pending = client.submit("slow")
            with pytest.raises(CallTimeout, match=r"'slow' within 0\.05 s.*0 other calls.*alive"):
                pending.result(timeout_s=0.05)
            go.set()
            assert client.call("echo", "next") == "next"
        go.set()
        assert client.call("slow").numel() == 48 * 1024


def test_the_clients_own_timeout_is_the_default(serve: Serve, address: str) -> None:
    """``timeout_s`` of the client holds where a call names none."""
    go = threading.Event()
    serve(slow=lambda: go.wait(10))
    with Client(address, timeout_s=0.05) as client:
        with pytest.raises(CallTimeout):
            client.call("slow")
        go.set()


def test_a_call_that_has_timed_out_says_so_when_asked_again(serve: Serve, address: str) -> None:
    """A second ``result()`` of a call that was given up can't wait for a reply that will be thrown away."""
    go = threading.Event()
    serve(slow=lambda: go.wait(10), echo=echo)
    with Client(address, timeout_s=5.0) as client:
        pending = client.submit("slow")
        with pytest.raises(CallTimeout):
            pending.result(timeout_s=0.05)
        go.set()
        assert client.call("echo", 1) == 1
        with pytest.raises(CallTimeout, match=r"0\.05 s"):
            pending.result(timeout_s=0.5)


# Snapshots


def test_a_snapshot_never_changes_afterwards(serve: Serve, address: str) -> None:
    """With snapshot=True the server can't change a result that the client has checked; without, it can."""
    server: Server
    kept: list[torch.Tensor] = []

    def give() -> list[Any]:
        kept.append(server.empty((16,), torch.float32).fill_(1))
        return [kept[-1], kept[-1].numpy()]

    def tamper() -> None:
        for tensor in kept:
            tensor.fill_(666)

    server = serve(give=give, tamper=tamper)
    with Client(address, snapshot=True) as careful, Client(address) as trusting:
        private, array = careful.call("give")
        view, _ = trusting.call("give")
        trusting.call("tamper")
        assert private.tolist() == [1] * 16
        assert array.tolist() == [1] * 16
        assert view.tolist() == [666] * 16
    kept.clear()


def test_snapshots_hold_no_room_in_the_arena(worker: str) -> None:
    """Any number of them can be kept."""
    with Client(worker, arena_bytes=64 * 1024, snapshot=True) as client:
        kept = [client.call("fill", 8 * 1024, float(i)) for i in range(20)]
    assert [int(tensor[-1]) for tensor in kept] == list(range(20))


# Statistics


def test_statistics_count_calls_and_bytes_on_both_sides(serve: Serve, address: str) -> None:
    """Calls, failures, tensor bytes, copies and control bytes; what one side sends the other receives."""
    server: Server

    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 2, out=server.empty(x.shape, x.dtype))

    server = serve(double=double)
    with Client(address) as client:
        for _ in range(10):
            client.call("double", torch.ones(100))
        loan = client.empty((50,), torch.float64).fill_(0)
        client.call("double", loan)
        with pytest.raises(RemoteError):
            client.call("double", 1)
        mine, theirs = client.statistics(), server.statistics()
    for side in (mine, theirs):
        assert side.calls == 12
        assert side.failures == 1
        assert side.call_seconds > 0
        assert side.serialize_seconds > 0
        assert side.deserialize_seconds > 0
    assert mine.tensor_bytes_sent == theirs.tensor_bytes_received == 10 * 400 + 400
    assert mine.tensor_bytes_received == theirs.tensor_bytes_sent == 10 * 400 + 400
    assert (mine.bytes_copied, mine.tensors_copied) == (10 * 400, 10)
    assert (theirs.bytes_copied, theirs.tensors_copied) == (0, 0)
    assert 0 < mine.control_bytes_sent == theirs.control_bytes_received < 12 * 200
    assert 0 < theirs.control_bytes_sent == mine.control_bytes_received < 12 * 400


def test_statistics_are_frozen_and_print_as_a_table(worker: str) -> None:
    """A snapshot of the totals that later calls don't change, in rows with units."""
    with Client(worker) as client:
        client.call("echo", torch.zeros(MIB, dtype=torch.uint8))
        before = client.statistics()
        client.call("echo")
        assert before.calls == 1
        with pytest.raises(AttributeError):
            before.calls = 5  # type: ignore[misc]
        titles, values = str(before).splitlines()
        assert titles.split()[0] == "calls"
        assert values.split()[0] == "1"
        assert "1.0 MiB" in values


def test_control_messages_do_not_grow_with_the_tensor(worker: str) -> None:
    """A few hundred bytes a call, whether a tensor has 4 bytes or 16 MiB."""
    with Client(worker) as client:
        client.call("double", torch.zeros(1))
        small = client.statistics().control_bytes_sent
        client.call("double", torch.zeros(4 * MIB))
        assert client.statistics().control_bytes_sent - small < small + 32


# The end of a client


def test_after_close_every_use_raises_closed(worker: str) -> None:
    """call, submit and empty say Closed; a second close does nothing."""
    client = Client(worker)
    client.call("echo", 1)
    client.close()
    client.close()
    for use in (
        lambda: client.call("echo", 1),
        lambda: client.submit("echo"),
        lambda: client.empty((1,), torch.uint8),
        lambda: client.server_pid,
    ):
        with pytest.raises(Closed):
            use()
    assert client.statistics().calls == 1


def test_calls_in_flight_fail_with_closed(worker: str) -> None:
    """A pending reply of a closed client raises at once."""
    client = Client(worker)
    pending = client.submit("sleep", 0.2)
    client.close()
    assert pending.done
    with pytest.raises(Closed):
        pending.result()


def test_results_and_loans_stay_valid_after_close(worker: str) -> None:
    """Tensors keep the memory they look into; dropping them then is safe too."""
    with Client(worker, arena_bytes=MIB) as client:
        result = client.call("fill", 1000, 3.0)
        array = client.call("echo", np.arange(10))
        loan = client.empty((1000,), torch.float32).fill_(4)
    del client
    gc.collect()
    with Client(worker, arena_bytes=MIB) as other:
        other.call("fill", 1000, 5.0)
    assert torch.equal(result, torch.full((1000,), 3.0))
    assert array.tolist() == list(range(10))
    assert torch.equal(loan, torch.full((1000,), 4.0))
    result += 1  # it is ordinary memory
    del result, array, loan
    gc.collect()


def test_the_context_manager_closes_also_on_an_error(worker: str) -> None:
    """The error itself passes through."""
    with pytest.raises(ZeroDivisionError), Client(worker) as client:
        _ = 1 / 0
    with pytest.raises(Closed):
        client.call("echo")


def test_a_client_can_connect_again_and_again(worker: str) -> None:
    """50 connections in turn leave nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        with Client(worker, arena_bytes=4096) as client:
            assert client.call("echo", i) == i
    del client
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# The server's interface


def test_a_name_can_be_registered_once(address: str) -> None:
    """The second handler of a name is a LocalProtocolError, by decorator too."""
    with Server(address) as server:
        server.register("echo", echo)
        with pytest.raises(LocalProtocolError, match="'echo' is already registered"):
            server.register("echo", echo)
        with pytest.raises(LocalProtocolError):
            server.method(echo)


def test_the_decorator_registers_and_returns_the_function(serve: Serve, address: str) -> None:
    """``@server.method`` leaves the function usable as it is."""
    server = serve()

    @server.method
    def add(a: int, b: int) -> int:
        return a + b

    assert add(1, 2) == 3
    with Client(address) as client:
        assert client.call("add", 1, 2) == 3


def test_empty_outside_of_a_handler_is_a_local_error(serve: Serve, address: str) -> None:
    """There is no caller whose arena it could use; the same for connection_id. Also after a handler has run."""
    server = serve(echo=echo)
    with Client(address) as client:
        client.call("echo")
        with pytest.raises(LocalProtocolError, match="inside a handler"):
            server.empty((1,), torch.uint8)
        with pytest.raises(LocalProtocolError, match="inside a handler"):
            _ = server.connection_id


def test_each_connection_has_a_number_of_its_own_and_its_end_is_told_once(serve: Serve, address: str) -> None:
    """Numbers are never used again; on_disconnect hears of each once."""
    gone: list[int] = []
    server: Server
    server = serve(number=lambda: server.connection_id)
    server.on_disconnect(gone.append)
    seen = []
    for _ in range(3):
        with Client(address) as client, Client(address) as other:
            seen += [client.call("number"), other.call("number")]
            assert client.call("number") == seen[-2]
    assert len(set(seen)) == 6
    assert eventually(lambda: len(gone) == 6)
    assert sorted(gone) == sorted(seen)


def test_a_failing_on_disconnect_callback_does_not_end_the_server(
    serve: Serve, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are still called, and the server serves on."""
    gone: list[int] = []

    def fail(_number: int) -> None:
        raise DeliberateError("a callback failed")

    server = serve(echo=echo)
    server.on_disconnect(fail)
    server.on_disconnect(gone.append)
    Client(address).close()
    with Client(address, connect_timeout_s=2.0) as client:
        assert client.call("echo", 1) == 1
    assert eventually(lambda: len(gone) == 2)


# Garbage collection


def test_a_collection_inside_a_handler_is_safe(serve: Serve, address: str) -> None:
    """Tensors caught in reference cycles are released there, on the server's thread, in mid-call."""
    server: Server

    def churn(x: torch.Tensor) -> torch.Tensor:
        cycle: list[Any] = [x, server.empty((1024,), torch.float32)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        return server.empty(x.shape, x.dtype).copy_(x)

    server = serve(churn=churn)
    with Client(address, arena_bytes=64 * 1024) as client:
        for i in range(20):
            cycle: list[Any] = [client.call("churn", torch.full((1024,), float(i)))]
            assert cycle[0][1023] == i
            cycle.append(cycle)


def test_a_thread_that_collects_all_the_time_disturbs_no_call(worker: str) -> None:
    """Releases on another thread, at any moment, neither deadlock nor free what is still held."""
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            gc.collect(0)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        with Client(worker, arena_bytes=MIB) as client:
            for i in range(100):
                x = torch.full((2048,), float(i))
                for _ in range(20):  # cycles full of borrows pile up until a collection; then there is room again
                    try:
                        y = client.call("double", x)
                        break
                    except ArenaFull:
                        gc.collect()
                assert torch.equal(y, x * 2)
                cycle: list[Any] = [y, client.empty((16,), torch.float32)]
                cycle.append(cycle)
                del cycle
    finally:
        stop.set()
        thread.join()
