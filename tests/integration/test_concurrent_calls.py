"""Several calls, clients, threads and garbage collections at once."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from shmtransport import ArenaFull, Client, LocalProtocolError, Server
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import MIB, Serve
from tests.support.process import ROOT

# Several calls at once


def test_several_calls_may_be_in_flight(shared_server: str, channel: ChannelKind) -> None:
    """Each pending reply gets its own result."""
    with Client(shared_server, channel=channel) as client:
        pending = [client.submit("double", torch.full((100,), float(i))) for i in range(50)]
        for i, reply in enumerate(pending):
            assert torch.equal(reply.result(), torch.full((100,), 2.0 * i))


def test_results_may_be_asked_for_in_any_order_and_more_than_once(shared_server: str, channel: ChannelKind) -> None:
    """Last first; and asking again gives the same result."""
    with Client(shared_server, channel=channel) as client:
        pending = [client.submit("echo", i) for i in range(20)]
        assert [reply.result() for reply in reversed(pending)] == list(reversed(range(20)))
        assert pending[3].result() == 3
        assert all(reply.done() for reply in pending)


def test_a_failed_call_fails_alone(shared_server: str, channel: ChannelKind) -> None:
    """Of several calls in flight only that one raises."""
    with Client(shared_server, channel=channel) as client:
        good, bad, after = client.submit("echo", 1), client.submit("no such"), client.submit("echo", 2)
        assert after.result() == 2
        with pytest.raises(LocalProtocolError):
            bad.result()
        assert good.result() == 1


def test_pending_replies_that_nobody_keeps_release_their_results(shared_server: str, channel: ChannelKind) -> None:
    """A reply that is never asked for holds no room once it is taken off the channel."""
    with Client(shared_server, channel=channel, arena_bytes=MIB) as client:
        for i in range(40):
            client.submit("fill", 64 * 1024, float(i))  # 256 KiB of result, four of them fill the arena
            assert client.call("echo", i) == i


def test_one_client_may_be_used_by_several_threads(shared_server: str, channel: ChannelKind) -> None:
    """Every thread gets the results of its own calls."""
    with Client(shared_server, channel=channel) as client:

        def work(number: int) -> bool:
            return all(
                torch.equal(client.call("double", torch.full((64,), float(number))), torch.full((64,), 2.0 * number))
                for _ in range(50)
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


def test_several_clients_at_once_never_see_each_others_data(shared_server: str, channel: ChannelKind) -> None:
    """Four clients, each with its own values, many rounds in small arenas, all contents checked."""

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        with Client(shared_server, channel=channel, arena_bytes=256 * 1024) as client:
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
    """The same with processes: each checks its own results and reports what it found."""
    server = serve(double=lambda x: x * 2)
    processes = [
        spawn(ROOT / "tests/support/processes/checking_client.py", address, str(number), kind)
        for number, kind in enumerate(("zmq", "doorbell", "zmq", "doorbell"))
    ]
    for process in processes:
        assert process.readline() == "all results were right"
        assert process.wait() == 0
    assert server.statistics().calls == 4 * 100
    assert server.statistics().failures == 0


# Garbage collection


def test_a_collection_inside_a_handler_is_safe(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Tensors caught in reference cycles are released there, on the server's thread, in mid-call."""
    server: Server

    def churn(x: torch.Tensor) -> torch.Tensor:
        cycle: list[Any] = [x, server.empty((1024,), torch.float32)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        return server.empty(x.shape, x.dtype).copy_(x)

    server = serve(churn=churn)
    with Client(address, channel=channel, arena_bytes=64 * 1024) as client:
        for i in range(20):
            cycle: list[Any] = [client.call("churn", torch.full((1024,), float(i)))]
            assert cycle[0][1023] == i
            cycle.append(cycle)


def test_a_thread_that_collects_all_the_time_disturbs_no_call(shared_server: str, channel: ChannelKind) -> None:
    """Releases on another thread, at any moment, neither deadlock nor free what is still held."""
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            gc.collect(0)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        with Client(shared_server, channel=channel, arena_bytes=MIB) as client:
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
