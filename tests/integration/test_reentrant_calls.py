"""Calls within calls of the same thread: by signal handlers, and by finalizers that a garbage collection runs."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shmtransport import Client, Closed
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import MIB, Spawn, eventually, in_thread, start_server

pytestmark = pytest.mark.timeout(60)

STRESS_S = 0.8


@pytest.fixture
def client(spawn: Spawn, address: str, channel: ChannelKind) -> Iterator[Client]:
    """Of a server in a process of its own; a call that waits for itself would take its whole time-out."""
    start_server(spawn, address)
    with Client(address, channel=channel, timeout_s=20.0, arena_bytes=MIB) as connected:
        yield connected


@contextlib.contextmanager
def on_alarm(handler: Callable[[], None]) -> Iterator[None]:
    """Have a handler called whenever the real-time timer goes off."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def doubled(client: Client, size: int, value: float) -> bool:
    """Whether a call with a tensor gives the right one."""
    return torch.equal(client.call("double", torch.full((size,), value)), torch.full((size,), 2 * value))


@pytest.mark.parametrize("tensors", [False, True])
def test_a_signal_handler_may_call_while_its_thread_waits(client: Client, tensors: bool) -> None:
    """The inner call ends before the outer one continues, in far less than the time-out."""
    done: list[bool] = []

    def handler() -> None:
        done.append(doubled(client, 100, 3.0) if tensors else client.call("echo", 7) == 7)

    with on_alarm(handler):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        client.call("sleep", 0.3)
        assert done == [True]
    assert client.call("echo", 8) == 8


def test_a_signal_handler_may_call_while_another_thread_receives(client: Client) -> None:
    """It waits for its turn like any call, and not for the outer call of its own thread."""
    slow = in_thread(client.call, "sleep", 0.5)
    assert eventually(lambda: bool(client._exchange.turns.received_for))
    done: list[bool] = []
    with on_alarm(lambda: done.append(doubled(client, 100, 3.0))):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert doubled(client, 50, 5.0)
        assert done == [True]
    slow.result(10.0)


def test_calls_go_as_deep_as_handlers_interrupt_each_other(client: Client) -> None:
    """Each level is interrupted by the next one while it waits."""
    depths: list[int] = []

    def handler() -> None:
        depth = len(depths)
        depths.append(depth)
        if depth < 3:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            client.call("sleep", 0.1)
        assert doubled(client, 10, float(depth))

    with on_alarm(handler):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        client.call("sleep", 0.1)
        assert depths == [0, 1, 2, 3]


def test_a_finalizer_may_call_in_a_collection_in_the_middle_of_a_call(client: Client) -> None:
    """Wherever the collection comes: a threshold of a few objects brings many in each call."""
    done: list[bool] = []

    class Handle:
        """Tells the server when it dies, as the handle of something remote does."""

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            done.append(doubled(client, 10, 2.0))

    before = gc.get_threshold()
    gc.set_threshold(5)
    try:
        for value in range(50):
            Handle()
            assert doubled(client, 1000, float(value))
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert done == [True] * 50


def test_signals_at_random_and_other_threads(client: Client) -> None:
    """Every reply is its own call's, in every thread, and none takes the time-out."""
    numbers = random.Random(7)
    counts = {"outer": 0, "inner": 0, "other": 0}
    until = time.monotonic() + STRESS_S

    def once(who: str) -> None:
        assert doubled(client, numbers.choice((1, 50, 4000)), float(counts[who]))
        counts[who] += 1

    def others() -> None:
        while time.monotonic() < until:
            once("other")

    def handler() -> None:
        once("inner")
        signal.setitimer(signal.ITIMER_REAL, numbers.random() * 0.02 + 1e-6)

    threads = [in_thread(others) for _ in range(2)]
    with on_alarm(handler):
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        while time.monotonic() < until:
            once("outer")
    for thread in threads:
        thread.result(30.0)
    assert min(counts.values()) > 10
    assert eventually(lambda: not client._exchange.turns.received_for)


@pytest.mark.parametrize("end", ["close", "reconnect"])
def test_a_signal_handler_may_end_the_connection(client: Client, end: str) -> None:
    """The call that it interrupts fails with ``Closed``; after a reconnection the client goes on."""
    threads = threading.active_count()
    with on_alarm(getattr(client, end)):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Closed):
            client.call("sleep", 0.5)
    if end == "reconnect":
        assert doubled(client, 100, 1.0)
    else:
        with pytest.raises(Closed):
            client.call("echo", 1)
    assert threading.active_count() == threads


def test_what_an_inner_call_raises_is_the_outer_ones(client: Client, channel: ChannelKind) -> None:
    """As any exception of a signal handler: the outer call ends with it, and its reply is thrown away."""

    def handler() -> None:
        client.call("no such method")

    with on_alarm(handler):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Exception, match="no such method"):
            client.call("sleep", 0.3)
    result: Any = client.call("echo", 2)
    assert result == 2
