"""One client used by several threads: each gets its own results, none delays another, and all end together."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import shmtransport.endpoints.exchange
from shmtransport import CallCancelled, CallTimeout, Client, Closed, PendingReply
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import KIB, MIB, Spawn, eventually, in_thread, start_server

pytestmark = pytest.mark.timeout(60)

SOON_S = 5.0  # a time-out of the test; a forgotten thread would wait for much longer


def test_calls_of_many_threads_are_right_and_every_thread_gets_on(shared_server: str, channel: ChannelKind) -> None:
    """8 threads call until each has made 100: all contents are right, and that takes them no 20 000 in all."""
    threads, wanted, most = 8, 100, 20_000
    made = [0] * threads
    begin = threading.Barrier(threads)

    def work(number: int) -> None:
        begin.wait()
        while min(made) < wanted and sum(made) < most:
            x = torch.full((1 + made[number] % 500,), float(number))
            y, tag = client.call("echo", [x * 2, f"{number}/{made[number]}"])
            assert torch.equal(y, x * 2)
            assert tag == f"{number}/{made[number]}"
            made[number] += 1

    with Client(shared_server, channel=channel, arena_bytes=MIB, timeout_s=20.0) as client:
        for thread in [in_thread(work, number) for number in range(threads)]:
            thread.result(50.0)
        assert client.statistics().calls == sum(made)
        assert 1 < client.statistics().in_flight_peak <= threads
    assert min(made) >= wanted, made


def test_threads_with_several_calls_in_flight_each(shared_server: str, channel: ChannelKind) -> None:
    """Submitted in one order and asked for in another, in an arena that has not room for all: contents are right."""

    def work(number: int) -> None:
        for turn in range(20):
            values = [1000.0 * number + 10 * turn + i for i in range(6)]
            pending = [client.submit("total", torch.full((2 * KIB,), value)) for value in values]
            for i in (3, 0, 5, 1, 4, 2):
                assert pending[i].result() == values[i] * 2 * KIB

    with Client(shared_server, channel=channel, arena_bytes=128 * KIB, timeout_s=20.0) as client:
        for thread in [in_thread(work, number) for number in range(6)]:
            thread.result(50.0)


@pytest.mark.parametrize("receiver", ["the slow one", "the quick one"])
def test_a_thread_that_waits_for_long_keeps_no_other_from_its_reply(
    shared_server: str, channel: ChannelKind, receiver: str
) -> None:
    """Whichever of the two waits first, and so receives for both: each returns as soon as its reply is there."""
    with Client(shared_server, channel=channel, timeout_s=50.0) as client:
        quick, slow = client.submit("sleep", 0.1), client.submit("sleep", 0.2)
        order = [slow, quick] if receiver == "the slow one" else [quick, slow]

        def wait_for(pending: PendingReply) -> float:
            pending.result()
            return time.monotonic()

        first = in_thread(wait_for, order[0])
        assert eventually(lambda: order[0]._call in client._exchange.turns.received_for)
        second = in_thread(wait_for, order[1])
        returned = dict(zip(order, (first.result(SOON_S), second.result(SOON_S)), strict=True))
        assert returned[quick] < returned[slow]


def test_a_call_made_while_another_thread_receives_is_answered(shared_server: str, channel: ChannelKind) -> None:
    """Also if the caller itself takes the reply that the receiver waits for: that one is woken."""
    with Client(shared_server, channel=channel, timeout_s=50.0) as client:
        for _ in range(20):
            slow = client.submit("sleep", 0.01)
            waiting = in_thread(slow.result)
            assert client.call("echo", 1) == 1
            waiting.result(SOON_S)


def test_a_reply_that_another_thread_takes_wakes_its_owner(
    shared_server: str, channel: ChannelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it was about to block, and nothing else would ever come."""
    # Otherwise it would look by itself after a while.
    monkeypatch.setattr(shmtransport.endpoints.exchange, "_WATCH_SLICE_S", 50.0)
    with Client(shared_server, channel=channel, timeout_s=50.0) as client:
        about_to_wait, go_on = threading.Event(), threading.Event()
        link = client._exchange.live()
        wait = link.channel.wait

        def late_wait(timeout_s: float) -> bool:
            about_to_wait.set()
            go_on.wait(10.0)
            return wait(timeout_s)

        monkeypatch.setattr(link.channel, "wait", late_wait)
        owned = client.submit("sleep", 0.2)
        owner = in_thread(owned.result)
        assert about_to_wait.wait(SOON_S)

        def take() -> bool:
            with client._exchange.lock:
                client._exchange._receive_all(link)
            return owned.done()

        assert eventually(take)
        go_on.set()
        assert owner.result(SOON_S) is None


def test_several_threads_may_wait_for_one_call(shared_server: str, channel: ChannelKind) -> None:
    """All of them get its result, or the error of the one that cancels it; a wait that runs out ends no other."""
    with Client(shared_server, channel=channel, timeout_s=50.0) as client:
        pending = client.submit("sleep", 0.1)
        waiting = [in_thread(pending.result) for _ in range(5)]
        assert [thread.result(SOON_S) for thread in waiting] == [None] * 5
        pending = client.submit("sleep", 0.4)
        waiting = [in_thread(pending.result) for _ in range(3)]
        with pytest.raises(CallTimeout):
            pending.result(timeout_s=0.1)
        assert [thread.result(SOON_S) for thread in waiting] == [None] * 3
        pending = client.submit("sleep", 0.4)
        waiting = [in_thread(pending.result) for _ in range(3)]
        assert eventually(lambda: client._exchange.turns.received_for)
        assert pending.cancel()
        for thread in waiting:
            with pytest.raises(CallCancelled):
                thread.result(SOON_S)
        assert client.call("echo", 1) == 1


@pytest.mark.parametrize("receiver", ["the impatient one", "the patient one"])
def test_a_time_out_in_one_thread_does_not_disturb_the_others(
    shared_server: str, channel: ChannelKind, receiver: str
) -> None:
    """Whether or not it was the one that received for all: the others' replies still reach them."""
    with Client(shared_server, channel=channel, timeout_s=50.0) as client:
        client.submit("sleep", 0.5)
        late, patient = client.submit("echo", "late"), [client.submit("echo", i) for i in range(3)]
        impatient = (lambda: in_thread(late.result, timeout_s=0.1),)
        waits = [*impatient, *(lambda i=i: in_thread(patient[i].result) for i in range(3))]
        if receiver == "the patient one":
            waits.reverse()
        threads = []
        for wait in waits:
            threads.append(wait())
            assert eventually(lambda: client._exchange.turns.received_for)
        if receiver == "the patient one":
            threads.reverse()
        with pytest.raises(CallTimeout, match=r"'echo' within 0\.1 s"):
            threads[0].result(SOON_S)
        assert [thread.result(SOON_S) for thread in threads[1:]] == [0, 1, 2]


def test_close_ends_the_waiting_of_all_threads(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """Those that wait for replies, and those that wait for room in the arena: each raises Closed."""
    start_server(spawn, address)
    client = Client(address, channel=channel, arena_bytes=64 * KIB, timeout_s=50.0)
    pending = [client.submit("total", torch.ones(48 * KIB, dtype=torch.uint8), 60.0)]
    pending += [client.submit("echo") for _ in range(4)]
    waiting = [
        *(in_thread(reply.result) for reply in pending),
        in_thread(client.call, "total", torch.ones(32 * KIB, dtype=torch.uint8)),
        in_thread(client.empty, (32 * KIB,), torch.uint8),
    ]
    assert eventually(lambda: client.statistics().stalls == 2)
    client.close()
    for thread in waiting:
        with pytest.raises(Closed):
            thread.result(SOON_S)
    with pytest.raises(Closed, match="closed"):
        client.call("echo")


def test_close_by_several_threads_at_once_closes_once(shared_server: str, channel: ChannelKind) -> None:
    """No thread's close fails, while another thread waits for a reply."""
    for _ in range(5):
        client = Client(shared_server, channel=channel, arena_bytes=4 * KIB)
        waiting = in_thread(client.call, "sleep", 0.05)
        for closing in [in_thread(client.close) for _ in range(4)]:
            closing.result(SOON_S)
        with pytest.raises(Closed):
            waiting.result(SOON_S)


def test_a_thread_that_sends_into_a_full_queue_forgets_nobody(shared_server: str) -> None:
    """While there is no room it receives for all; once its message is sent, another waiting thread takes over."""
    with Client(shared_server, channel="doorbell", timeout_s=50.0, max_message_bytes=1024) as client:
        client.submit("sleep", 0.5)
        time.sleep(0.1)
        first, second = client.submit("echo", "x" * 900), client.submit("echo", "y" * 900)
        sending = in_thread(client.submit, "echo", "z" * 900)
        assert eventually(lambda: client.statistics().stalls == 1)
        waiting = in_thread(second.result)
        third = sending.result(SOON_S)
        assert waiting.result(SOON_S) == "y" * 900
        assert first.result(SOON_S) == "x" * 900
        assert third.result(SOON_S) == "z" * 900


def test_threads_that_flood_the_queue_all_get_their_replies(shared_server: str) -> None:
    """Requests and replies that fill the message rings in both directions, from 4 threads at once."""

    def work(number: int) -> None:
        texts = [f"{number}/{i}/" + "x" * 700 for i in range(100)]
        pending = [client.submit("echo", text) for text in texts]
        assert [reply.result() for reply in pending] == texts

    with Client(shared_server, channel="doorbell", timeout_s=50.0, max_message_bytes=1024) as client:
        for thread in [in_thread(work, number) for number in range(4)]:
            thread.result(50.0)
        assert client.statistics().stalls > 0
