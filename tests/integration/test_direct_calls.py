"""Direct calls: what the compiled core does in one step is what the whole path does, and it is done where it can be.

By doorbell that is a call from its arguments to its result, by ZeroMQ each message by itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from shmtransport import Client, PeerDied, Server, Statistics
from shmtransport.endpoints import exchange
from shmtransport.memory.views import HAS_EXCHANGE
from shmtransport.protocol import calls, values
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import KIB, MIB, eventually, in_thread

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not HAS_EXCHANGE, reason="the compiled core does not make the tensors"),
]

_KEPT = torch.arange(64)


class _Odd:
    """A value that can't be sent."""


def _raise(what: str) -> None:
    raise ValueError(what)


def _methods(server: Server) -> dict[str, Callable[..., Any]]:
    return {
        "echo": lambda *arguments, **keywords: [list(arguments), keywords],
        "double": lambda x: torch.mul(x, 2, out=server.empty(x.shape, x.dtype)),
        "twice": lambda x: np.multiply(x, 2, out=server.empty(x.shape, x.dtype).numpy()),
        "kept": lambda: _KEPT,
        "raise": _raise,
        "odd": _Odd,
        "caller": lambda: server.connection_id,
        "large": lambda: "x" * (2 * MIB),
    }


@contextmanager
def _served(address: str, *, directly: bool, channel: ChannelKind = "doorbell") -> Iterator[tuple[Server, Client]]:
    """A server and a client, both with direct calls or neither."""
    with pytest.MonkeyPatch.context() as patch:
        if not directly:
            patch.setattr(values, "MessageCalls", None)
        with Server(address) as server:
            for name, method in _methods(server).items():
                server.register(name, method)
            serving = in_thread(server.serve)
            with Client(address, channel=channel, arena_bytes=MIB, timeout_s=20.0) as client:
                client.call("echo")
                yield server, client
            server.stop()
            serving.result(20.0)


_CALLS: dict[str, tuple[str, Callable[[Client], tuple[Any, ...]], dict[str, Any]]] = {
    "nothing": ("echo", lambda _: (), {}),
    "plain values": ("echo", lambda _: (1, -1, 2**63, 0.5, "é", b"\0", None, True, [1, (2, {"a": 3, 4: []})]), {}),
    "keywords": ("echo", lambda _: (), {"self": 1, "method": [2], "timeout_s": (3,)}),
    "in place": ("double", lambda client: (client.empty((3, 5), torch.float32).fill_(7.0),), {}),
    "a copy": ("double", lambda _: (torch.arange(9, dtype=torch.bfloat16),), {}),
    "a strided tensor": ("double", lambda _: (torch.arange(20.0).reshape(4, 5).t(),), {}),
    "a long copy": ("double", lambda _: (torch.ones(300 * KIB, dtype=torch.uint8),), {}),
    "no elements": ("echo", lambda _: (torch.empty(0, 3),), {}),
    "several tensors": ("echo", lambda client: ([client.empty(4, "int64").fill_(1), torch.ones(2)], {"k": _KEPT}), {}),
    "an array": ("echo", lambda _: (np.arange(6, dtype=np.int16).reshape(2, 3),), {}),
    "an array in place": ("twice", lambda client: (client.empty((3, 5), "float32").fill_(7.0).numpy(),), {}),
    "a read-only array": ("twice", lambda _: (np.broadcast_to(np.float64(3.0), (2, 2)),), {}),
    "an array that is one number to all": ("twice", lambda _: np.broadcast_arrays(np.ones(3), np.ones((2, 3)))[:1], {}),
    "a strided array": ("twice", lambda _: (np.arange(20.0).reshape(4, 5).T,), {}),
    "an array that runs backwards": ("twice", lambda _: (np.arange(5)[::-1],), {}),
    "an array of another byte order": ("twice", lambda _: (np.arange(5, dtype=">i4"),), {}),
    "an array of another library's dtype": ("echo", lambda _: (np.ones(3, ml_dtypes.bfloat16),), {}),
    "a scalar array": ("twice", lambda _: (np.array(2.5),), {}),
    "an array without elements": ("twice", lambda _: (np.empty((0, 3)),), {}),
    "an array of objects": ("twice", lambda _: (np.array([None, 1]),), {}),
    "an array beside a tensor that can't be one": ("echo", lambda _: (_KEPT.bfloat16(), np.ones(2)), {}),
    "what the server keeps": ("kept", lambda _: (), {}),
    "an error": ("raise", lambda _: ("deliberate",), {}),
    "wrong arguments": ("double", lambda _: (), {}),
    "no such method": ("none", lambda _: (), {}),
    "a result that can't be sent": ("odd", lambda _: (), {}),
    "a result that is too large": ("large", lambda _: (), {}),
    "an argument that can't be sent": ("echo", lambda _: (_Odd(),), {}),
    "an argument that is too large": ("echo", lambda _: (torch.ones(2 * MIB, dtype=torch.uint8),), {}),
    "an integer that is too large": ("echo", lambda _: (2**64,), {}),
    "a dict's key": ("echo", lambda _: ({1.5: 2},), {}),
    "whom it serves": ("caller", lambda _: (), {}),
}


def _plain(value: Any) -> Any:
    """A value in terms that can be compared."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, value.tolist()
    if isinstance(value, np.ndarray):
        return "array", value.dtype, value.flags.writeable, value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value), [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _counted(statistics: Statistics) -> dict[str, int]:
    """What does not depend on time."""
    names = ("calls", "failures", "tensors_sent", "tensors_copied", "tensor_bytes_sent", "tensor_bytes_received")
    names += ("bytes_copied", "control_bytes_sent", "control_bytes_received", "in_flight_peak")
    counted = {name: getattr(statistics, name) for name in names}
    return {**counted, "timed": sum(count for _, count in statistics.latency_histogram)}


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return _plain(call())
    except Exception as error:  # noqa: BLE001 - whatever it is, it must be the same
        return type(error), str(error)


def _outcomes(address: str, channel: ChannelKind, what: str, *, directly: bool) -> list[Any]:
    method, make, keywords = _CALLS[what]
    with _served(address, directly=directly, channel=channel) as (server, client):
        assert (client._exchange._direct is not None) == (directly and channel == "doorbell")
        found = [_outcome(lambda: client.call(method, *make(client), **keywords)) for _ in range(3)]
        assert eventually(lambda: server.statistics().calls >= client.statistics().calls)
        connection = client._exchange.connection
        assert connection is not None
        found += [_counted(client.statistics()), _counted(server.statistics()), len(connection.protocol)]
    return found


@pytest.mark.parametrize("what", _CALLS)
def test_a_direct_call_is_what_the_whole_path_makes_of_it(address: str, channel: ChannelKind, what: str) -> None:
    """The same results, errors in the same words, the same totals on both sides; nothing is left in flight."""
    direct, whole = (_outcomes(address, channel, what, directly=directly) for directly in (True, False))
    assert direct == whole


def test_plain_calls_are_direct(address: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side's whole path is taken while calls follow each other, whatever they carry that is plain."""
    with _served(address, directly=True, channel=channel) as (server, client):
        client.call("double", torch.ones(3))

        def whole_path(*_: Any) -> None:
            raise AssertionError("the whole path was taken")

        if channel == "doorbell":
            for step in ("_start", "_begin_by_steps", "_wait_to_the_end"):
                monkeypatch.setattr(client._exchange, step, whole_path)
        monkeypatch.setattr(calls.ClientProtocol, "_read_reply", whole_path)
        monkeypatch.setattr(calls.ServerProtocol, "take_request", whole_path)
        monkeypatch.setattr(values.Codec, "encode_request", whole_path)
        monkeypatch.setattr(server, "_perform", whole_path)
        for number in range(20):
            assert client.call("double", torch.full((4,), float(number))).tolist() == [2.0 * number] * 4
            assert client.call("twice", np.full(4, float(number))).tolist() == [2.0 * number] * 4
        pending = [client.submit("echo", number) for number in range(64)]
        assert [one.result() for one in pending] == [[[number], {}] for number in range(64)]
        monkeypatch.undo()


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_result_of_a_direct_call_is_borrowed_unless_it_is_to_be_a_snapshot(address: str, snapshot: bool) -> None:
    """The peer's block is held for as long as the result lives, and handed out once."""
    with _served(address, directly=True) as (_, other):
        other.call("echo")
        with Client(address, channel="doorbell", arena_bytes=MIB, snapshot=snapshot) as client:
            client.call("echo")
            assert (client._exchange._direct is None) == snapshot
            pending = client.submit("double", torch.ones(3))
            result = pending.result()
            connection = client._exchange.connection
            assert connection is not None
            assert len(connection.memory.receive_arena) == (not snapshot)
            del result
            assert len(connection.memory.receive_arena) == 0


@pytest.mark.parametrize("method", ["echo", "double", "twice"])
def test_when_a_reply_is_sent_nothing_of_its_call_is_held(
    address: str, channel: ChannelKind, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither arguments nor result, whether the core has made the reply or has left that: room is back by then."""
    with _served(address, directly=True, channel=channel) as (server, client):
        connection = client._exchange.connection
        assert connection is not None
        loans, reply, held = connection.memory.send_arena.loans, server._reply, []

        def watched(*arguments: Any) -> None:
            loans.collect()
            held.append(loans.held_by_peer)
            reply(*arguments)

        monkeypatch.setattr(server, "_reply", watched)
        for _ in range(3):
            client.call(method, torch.arange(6) if method == "double" else np.arange(6))
        assert held == [0] * (3 if channel == "zmq" else len(held))


def test_while_a_handler_runs_its_message_is_not_held(address: str, channel: ChannelKind) -> None:
    """Its plain values can be many: no frame beneath the handler has them any longer."""

    def holds(value: bytes) -> list[str]:
        held: list[str] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            found = list(frame.f_locals.values())
            found += [item for one in found if isinstance(one, (list, tuple)) for item in one]
            if any(isinstance(one, bytes) and len(one) >= len(value) for one in found):
                held.append(frame.f_code.co_name)
            frame = frame.f_back
        return held

    with _served(address, directly=True, channel=channel) as (server, client):
        server.register("holds", holds)
        for _ in range(3):
            assert client.call("holds", b"x" * 1000) == []


def test_threads_and_callbacks_share_a_client_with_direct_calls(address: str) -> None:
    """Each thread gets its own replies, and each callback is called once."""
    with _served(address, directly=True) as (_, client):
        called: list[int] = []
        wrong: list[Any] = []

        def work(thread: int) -> None:
            for number in range(100):
                value = 1000 * thread + number
                if number % 10 == 9:
                    client.submit("echo", value).add_done_callback(lambda one: called.append(one.result()[0][0]))
                elif (found := client.call("echo", value)) != [[value], {}]:
                    wrong.append((value, found))

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        expected = sorted(1000 * thread + number for thread in range(4) for number in range(9, 100, 10))
        assert eventually(lambda: sorted(called) == expected)


def test_a_direct_request_that_is_left_holds_nothing(address: str) -> None:
    """Tensors that were exported before something else was found are taken back; so is the expectation of a reply."""
    with _served(address, directly=True) as (_, client):
        connection = client._exchange.connection
        assert connection is not None
        calls, arena = client._exchange._direct, connection.memory.send_arena
        for rest in ((np.broadcast_to(1.0, 2),), (2**64,), (_Odd(),), ("x" * (2 * MIB),)):
            call = exchange.CallInFlight("echo")
            assert not calls.begin(call, (torch.ones(3), client.empty(2, "int8"), *rest), {})
            assert (arena.held_by_peer, len(connection.protocol), call.call_id) == (0, 0, -1)
        calls.close()
        assert not calls.begin(exchange.CallInFlight("echo"), (torch.ones(3),), {})
        assert arena.held_by_peer == 0


def test_a_stopping_server_takes_what_is_left_with_its_ring(address: str) -> None:
    """A goodbye behind the call in progress, which only the whole path reads, is read; ``serve`` ends."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return go_on.wait(20.0)

    with Server(address, drain_timeout_s=None) as server:
        server.register("wait", wait)
        server.register("echo", lambda: None)
        serving = in_thread(server.serve)
        client = Client(address, channel="doorbell", arena_bytes=MIB)
        client.call("echo")
        client.submit("wait")
        assert begun.wait(20.0)
        client.close()
        server.stop()
        go_on.set()
        serving.result(20.0)
        assert server.health()["clients"] == 0


def test_a_new_client_is_heard_while_the_server_looks_for_others(address: str) -> None:
    """Its first message is for the whole path, and comes while the server looks for direct calls for a minute."""
    with Server(address, spin_us=60e6) as server:
        server.register("echo", lambda value: value)
        serving = in_thread(server.serve)
        with Client(address, channel="doorbell", arena_bytes=MIB, timeout_s=20.0) as first:
            assert first.call("echo", 1) == 1
            assert first.call("echo", 2) == 2
            with Client(address, channel="doorbell", arena_bytes=MIB, timeout_s=20.0) as second:
                assert second.call("echo", 3) == 3
                assert second.call("echo", 4) == 4
            with Client(address, arena_bytes=MIB, timeout_s=20.0) as by_zmq:
                assert by_zmq.call("echo", 5) == 5
        server.stop()
        serving.result(20.0)


@pytest.mark.parametrize("channel", ["zmq", "doorbell"])
def test_a_reply_that_comes_while_its_thread_waits_for_the_lock_is_taken(address: str, channel: ChannelKind) -> None:
    """By another thread, which then finds the connection ended: the call has its result all the same."""
    with Server(address) as server:
        server.register("echo", lambda value: value)
        serving = in_thread(server.serve)
        with Client(address, channel=channel, arena_bytes=MIB) as client:
            state = client._exchange
            connection = state.connection
            assert connection is not None
            with state.lock:
                pending = client.submit("echo", 1)
                taking = in_thread(pending.result)
                assert not eventually(taking.done, 0.2), "it took its reply without the lock"
                assert eventually(lambda: state._receive(connection) or pending._call.ended)
                state._end(connection, PeerDied("the server ended the connection"))
            assert taking.result(20.0) == 1
        server.stop()
        serving.result(20.0)
