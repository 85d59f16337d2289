"""Calls in flight: polled, waited for together, called back, awaited, cancelled, bounded and repeated."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time

import pytest
import torch

from shmtransport import CallCancelled, CallTimeout, Client, LocalProtocolError, PeerDied, RemoteError, as_completed
from shmtransport import wait as wait_for_all
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import MIB, Serve, Spawn, echo, eventually, start_server
from tests.support.left_behind import kill

pytestmark = pytest.mark.timeout(60)


def _fail() -> None:
    raise ValueError("on purpose")


def _receivers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "shmtransport receiver"}


def test_a_loop_that_polls_ends(serve: Serve, address: str, channel: ChannelKind) -> None:
    """``done`` receives what has arrived: otherwise the loop would never end."""
    serve(echo=echo)
    with Client(address, channel=channel) as client:
        pending = [client.submit("echo", number) for number in range(100)]
        deadline = time.monotonic() + 30.0
        while not all(one.done() for one in pending):
            assert time.monotonic() < deadline
        assert [one.result() for one in pending] == list(range(100))
        assert not any(one.running() or one.cancelled() for one in pending)


def test_a_poll_finds_a_killed_server(spawn: Spawn, address: str, channel: ChannelKind) -> None:
    """The call has then ended with an error, which tells that it was sent."""
    server = start_server(spawn, address)
    with Client(address, channel=channel) as client:
        pending = client.submit("sleep", 60.0)
        assert not pending.done()
        kill(server)
        assert eventually(pending.done)
        error = pending.exception()
        assert isinstance(error, PeerDied)
        assert error.sent
        with pytest.raises(PeerDied) as caught:
            client.call("echo", 1)
        assert not caught.value.sent


def test_a_wait_that_runs_out_leaves_the_call_in_flight(serve: Serve, address: str, channel: ChannelKind) -> None:
    """A second wait gets the result; only ``call`` gives a call up when its time is over."""
    may_go_on = threading.Event()
    serve(block=lambda: may_go_on.wait(30.0))
    with Client(address, channel=channel) as client:
        pending = client.submit("block")
        for ask in (pending.result, pending.exception):
            with pytest.raises(CallTimeout, match=r"no reply to 'block' within 0\.01 s"):
                ask(0.01)
        may_go_on.set()
        assert pending.result(30.0) is True
        assert pending.exception() is None


def test_a_taken_result_keeps_no_room(serve: Serve, address: str, channel: ChannelKind) -> None:
    """The handle on a call may outlive its result; results without tensors can be asked for again."""
    server = serve()
    server.register("make", lambda: server.empty((3 * MIB,), torch.uint8))
    serve_plain = [1, 2]
    server.register("plain", lambda: serve_plain)
    with Client(address, channel=channel, reply_arena_bytes=4 * MIB) as client:
        kept = []
        for _ in range(3):
            pending = client.submit("make")
            assert pending.result().nbytes == 3 * MIB
            kept.append(pending)
        with pytest.raises(LocalProtocolError, match="handed out once"):
            kept[0].result()
        plain = client.submit("plain")
        assert plain.result() == plain.result() == serve_plain


def test_a_cancelled_call_is_over_and_its_late_reply_is_released(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """``cancel`` tells whether it was in time; the error is also one of concurrent.futures."""
    may_go_on = threading.Event()
    server = serve(echo=echo)

    def block() -> torch.Tensor:
        may_go_on.wait(30.0)
        return server.empty((3 * MIB,), torch.uint8)

    server.register("block", block)
    with Client(address, channel=channel, reply_arena_bytes=4 * MIB) as client:
        pending = client.submit("block")
        assert pending.cancel()
        assert pending.cancelled()
        assert pending.done()
        assert not pending.cancel()
        for ask in (pending.result, pending.exception):
            with pytest.raises(CallCancelled, match="'block' was cancelled"):
                ask()
            with pytest.raises(concurrent.futures.CancelledError):
                ask()
        may_go_on.set()
        assert client.call("echo", 1) == 1
        assert client.call("block").nbytes == 3 * MIB, "the late reply still holds its room"
        assert not client.submit("echo", 1).cancelled()


def test_callbacks_come_without_anyone_waiting(serve: Serve, address: str, channel: ChannelKind) -> None:
    """A thread receives while there are callbacks to make, and ends after them; what they raise harms nothing."""
    server = serve(echo=echo, fail=_fail)
    seen: list[object] = []
    others = _receivers()
    with Client(address, channel=channel) as client:
        pending = [client.submit("echo", number) for number in range(10)]
        failing = client.submit("fail")
        for one in pending:
            one.add_done_callback(lambda done: seen.append(done.result()))
        failing.add_done_callback(lambda done: 1 // 0)
        failing.add_done_callback(lambda done: seen.append(type(done.exception())))
        assert eventually(lambda: len(seen) == 11)
        assert seen[:10] == list(range(10))
        assert seen[10] is RemoteError
        assert eventually(lambda: _receivers() <= others)
        pending[0].add_done_callback(lambda done: seen.append("at once"))
        assert seen[-1] == "at once"
    assert server.statistics().failures == 1


def test_callbacks_come_beside_threads_that_wait(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Whichever thread receives a reply, its callbacks are called."""
    serve(echo=echo)
    seen: list[int] = []
    with Client(address, channel=channel) as client:

        def work() -> None:
            for number in range(50):
                client.submit("echo", number).add_done_callback(lambda done: seen.append(done.result()))
                client.call("echo", number)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
        assert eventually(lambda: len(seen) == 150)
        assert sorted(seen) == sorted(list(range(50)) * 3)


def test_callbacks_are_called_when_the_client_is_closed(serve: Serve, address: str, channel: ChannelKind) -> None:
    """They get the error that ended the call."""
    may_go_on = threading.Event()
    serve(block=lambda: may_go_on.wait(30.0))
    ended = threading.Event()
    others = _receivers()
    try:
        with Client(address, channel=channel) as client:
            client.submit("block").add_done_callback(lambda done: done.exception() and ended.set())
        assert ended.wait(10.0)
        assert eventually(lambda: _receivers() <= others)
    finally:
        may_go_on.set()


def test_several_calls_are_waited_for_as_futures_are(serve: Serve, address: str, channel: ChannelKind) -> None:
    """``wait`` and ``as_completed`` take the calls of any clients, and mean what those of concurrent.futures mean."""
    may_go_on = threading.Event()
    serve(echo=echo, fail=_fail, block=lambda: may_go_on.wait(30.0))
    with Client(address, channel=channel) as client, Client(address) as other:
        quick = [client.submit("echo", 1), other.submit("echo", 2)]
        assert {one.result() for one in as_completed(quick, 30.0)} == {1, 2}
        slow = client.submit("block")
        done, not_done = wait_for_all([*quick, slow], 0.0)
        assert slow in not_done
        assert wait_for_all([*quick, slow], 30.0, concurrent.futures.FIRST_COMPLETED).done == set(quick)
        with pytest.raises(TimeoutError):
            list(as_completed([slow], 0.01))
        may_go_on.set()
        done, not_done = wait_for_all([*quick, slow], 30.0)
        assert (done, not_done) == ({*quick, slow}, set())
        may_go_on.clear()
        failing = other.submit("fail")
        assert failing.exception() is not None
        slow = client.submit("block")
        done, not_done = wait_for_all([failing, slow], 30.0, concurrent.futures.FIRST_EXCEPTION)
        assert (done, not_done) == ({failing}, {slow})
        assert wait_for_all([slow], 0.01, concurrent.futures.FIRST_EXCEPTION).not_done == {slow}
        may_go_on.set()


def test_a_call_can_be_awaited(serve: Serve, address: str, channel: ChannelKind) -> None:
    """In an event loop that keeps doing other work; it raises the same errors as ``result``."""
    serve(echo=echo, fail=_fail)

    async def main(client: Client) -> None:
        assert await asyncio.gather(*(client.submit("echo", number) for number in range(10))) == list(range(10))
        with pytest.raises(RemoteError, match="on purpose"):
            await client.submit("fail")

    with Client(address, channel=channel) as client:
        asyncio.run(main(client))


def test_a_time_for_one_call_bounds_all_of_it(serve: Serve, address: str, channel: ChannelKind) -> None:
    """It covers waiting for room and for the reply; the client's own time and handlers' keywords are untouched."""
    may_go_on = threading.Event()
    serve(block=lambda x=None: may_go_on.wait(30.0), echo=lambda timeout_s: timeout_s)
    with Client(address, channel=channel, arena_bytes=MIB) as client:
        brief = client.with_options(timeout_s=0.1)
        started = time.monotonic()
        with pytest.raises(CallTimeout, match=r"within 0\.1 s") as caught:
            brief.call("block", torch.ones(MIB // 4 - 2048))
        assert caught.value.sent
        with pytest.raises(Exception, match="borrows by the peer"):  # the block's argument is still held there
            brief.call("block", torch.ones(MIB // 4 - 2048))
        assert time.monotonic() - started < 20.0
        may_go_on.set()
        assert brief.submit("echo", timeout_s=7).result() == client.call("echo", timeout_s=7) == 7
        with pytest.raises(LocalProtocolError, match="timeout_s"):
            client.with_options(timeout_s=-1)
        with pytest.raises(LocalProtocolError, match="retries"):
            client.with_options(retries=-1)


def test_what_a_client_and_a_call_are_shows(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Address, channel, calls in flight, and the end."""
    serve(echo=echo, fail=_fail)
    with Client(address, channel=channel) as client:
        pending = client.submit("echo", 1)
        assert repr(pending) == "<PendingReply 'echo': in flight>"
        shown = repr(client)
        assert address in shown
        assert channel in shown
        assert "1 calls in flight" in shown
        pending.result()
        assert repr(pending) == "<PendingReply 'echo': done>"
        failing = client.submit("fail")
        assert failing.exception() is not None
        assert repr(failing) == "<PendingReply 'fail': RemoteError>"
    assert "ended (this client was closed)" in repr(client)
