"""The doorbell channel in event loops, its relay threads, and its closing: nothing is missed or left behind."""

from __future__ import annotations

import functools
import gc
import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest

from shmtransport import OutOfResources
from shmtransport.channels import relay
from shmtransport.channels.doorbell_server import LoopDoorbells, ThreadDoorbells
from tests.support.doorbells import Caller, Party, all_messages, next_message, open_fds, relays
from tests.support.helpers import eventually, in_thread

RelaysNow = Callable[[], "list[str]"]

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("never_looks_again")]


@pytest.fixture(autouse=True)
def leaves_no_thread_or_descriptor(address: str) -> Iterator[None]:
    """Every test leaves no thread or file descriptor behind; those of an earlier test may still be on their way out."""
    gc.collect()
    threads, fds = threading.active_count(), open_fds()
    yield
    gc.collect()
    assert eventually(lambda: threading.active_count() <= threads and open_fds() <= fds)


@pytest.fixture
def relays_now(leaves_no_thread_or_descriptor: None) -> RelaysNow:
    """Return the names of the relays that run and that this test has started."""
    return functools.partial(relays, frozenset(threading.enumerate()))


@pytest.fixture
def party(leaves_no_thread_or_descriptor: None, address: str) -> Iterator[Party]:
    made = Party(address)
    yield made
    made.close()


@pytest.fixture
def looped(leaves_no_thread_or_descriptor: None, address: str) -> Iterator[Party]:
    """A party whose server is in an event loop."""
    made = Party(address, doorbells=LoopDoorbells)
    yield made
    made.close()


def _readable(descriptor: int, timeout_s: float = 30.0) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def _next_in_loop(party: Party) -> tuple[bytes, bytes]:
    """Receive the server's next message, waiting as an event loop does."""
    while True:
        received = party.server.receive()
        if received is not None:
            return received
        assert _readable(party.server.fileno()), "the event loop was not woken"
        party.server.wait(0)


# --- event loops ------------------------------------------------------------------------------------------------------


def test_a_clients_descriptor_is_readable_while_there_is_something(party: Party) -> None:
    """A message, new room or the end makes it readable; when nothing is left, it is no longer readable."""
    caller = party.caller()
    descriptor = caller.channel.fileno()
    assert caller.channel.fileno() == descriptor
    for _ in range(3):
        assert caller.channel.receive() is None
        assert not _readable(descriptor, 0.0)
        party.server.send(caller.name, b"first")
        party.server.send(caller.name, b"second")
        assert _readable(descriptor)
        assert caller.channel.receive() == b"first"
        assert caller.channel.receive() == b"second"
        assert eventually(lambda: caller.channel.receive() is None and not _readable(descriptor, 0.02))
    while caller.channel.send(bytes(1020)):
        pass
    assert not _readable(descriptor, 0.0)
    party.next_message()
    assert _readable(descriptor), "the event loop was not told that there is room"
    assert caller.channel.send(b"x")
    assert caller.channel.receive() is None
    party.server.disconnect(caller.name)
    assert _readable(descriptor)
    assert caller.channel.ended()


def test_a_message_between_looking_and_clearing_is_not_missed(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client in an event loop that finds nothing clears its descriptor, then looks once more."""
    caller = party.caller()
    caller.channel.fileno()
    clear = os.eventfd_read

    def send_and_clear(descriptor: int) -> int:
        party.server.send(caller.name, b"just now")
        os.eventfd_write(descriptor, 1)
        return clear(descriptor)

    monkeypatch.setattr(os, "eventfd_read", send_and_clear)
    assert caller.channel.receive() == b"just now"


def test_a_server_in_an_event_loop_misses_nobody(looped: Party) -> None:
    """Clients of both kinds, one message at a time, so that each must wake the loop; answers wake theirs."""
    caller, zmq_client = looped.caller(), looped.zmq_client()
    descriptor = caller.channel.fileno()
    for number in range(50):
        message = str(number).encode()
        caller.channel.send(message)
        assert _next_in_loop(looped) == (caller.name, message)
        zmq_client.send(message)
        assert _next_in_loop(looped)[1] == message
        looped.server.send(caller.name, message)
        while (received := caller.channel.receive()) is None:
            assert _readable(descriptor)
        assert received == message


def test_a_server_in_an_event_loop_flushes_when_a_client_has_read_on(looped: Party) -> None:
    """The client's reading wakes the loop, and what was queued follows in order."""
    caller = looped.caller()
    messages = [bytes([number]) * 1020 for number in range(9)]
    for message in messages:
        assert looped.server.send(caller.name, message)
    received: list[bytes] = []

    def step() -> bool:
        received.extend(all_messages(caller))
        if len(received) < len(messages):
            assert _readable(looped.server.fileno())
            looped.server.wait(0)
            assert looped.server.receive() is None
        return len(received) == len(messages)

    assert eventually(step)
    assert received == messages


def test_a_server_in_an_event_loop_is_woken(looped: Party) -> None:
    """By ``wake``, from any thread, with clients and without."""
    for _ in range(2):
        assert looped.server.receive() is None
        assert eventually(lambda: not (looped.server.wait(0) or _readable(looped.server.fileno(), 0.02)))
        work = in_thread(looped.server.wake)
        assert _readable(looped.server.fileno())
        work.result(30.0)
        looped.caller()


def test_event_loops_find_what_nobody_rang_for_and_are_not_woken_for_nothing(
    looped: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay looks by itself from time to time, for a message without a ring or an end; otherwise it stays quiet."""
    monkeypatch.setattr(relay, "SLICE_S", 0.01)
    caller = looped.caller()
    descriptors = caller.channel.fileno(), looped.server.fileno()
    assert eventually(lambda: not (looped.server.wait(0) or looped.server.receive() or _readable(descriptors[1], 0.02)))
    assert not any(_readable(descriptor, 0.1) for descriptor in descriptors)
    for _ in range(2):
        assert caller.ring.write(b"silent")
        assert _next_in_loop(looped) == (caller.name, b"silent")
        assert caller.server_ring.write(b"silent")
        assert _readable(descriptors[0])
        assert caller.channel.receive() == b"silent"
        assert eventually(lambda: caller.channel.receive() is None and not _readable(descriptors[0], 0.02))
    caller.server_ring.end()
    assert _readable(descriptors[0])


# --- descriptors that are watched -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_callers", [False, True])
def test_a_watched_descriptor_is_returned_once(party: Party, with_callers: bool) -> None:
    """With doorbell clients and without; after ``unwatch`` the server no longer watches it."""
    if with_callers:
        party.caller()
    reader, writer = os.pipe()
    seen: list[int] = []

    def wait() -> bool:
        seen.extend(party.server.wait(0.01))
        return bool(seen)

    try:
        party.server.watch(reader)
        os.write(writer, b"x")
        assert eventually(wait)
        for _ in range(3):
            party.server.wake()
            wait()
        assert seen == [reader]
        party.server.unwatch(reader)
        os.write(writer, b"x")
        for _ in range(3):
            party.server.wake()
            wait()
        assert seen == [reader]
    finally:
        os.close(reader)
        os.close(writer)


def test_what_the_relay_has_seen_is_returned_after_its_end(party: Party) -> None:
    """A process that ends just before the last doorbell client leaves is reported at once, not with the next event."""
    caller = party.caller()
    reader, writer = os.pipe()
    try:
        party.server.watch(reader)
        os.write(writer, b"x")
        assert eventually(lambda: bool(party.server._readable))
        party.server.disconnect(caller.name)
        party.base.wait(0)  # the wake-up that ended the relay may be left
        returned: list[int] = []
        work = in_thread(lambda: returned.extend(party.server.wait(None)))
        waited = not eventually(work.done, 5.0)
        party.server.wake()
        work.result(30.0)
        assert returned == [reader]
        assert not waited, "the server waited for something else, although it had been told"
    finally:
        os.close(reader)
        os.close(writer)


# --- threads and ends -------------------------------------------------------------------------------------------------


def test_a_relay_runs_only_while_there_are_doorbell_clients(relays_now: RelaysNow, party: Party) -> None:
    """None before the first and after the last, one in between; the same each time they come and go."""
    for _ in range(3):
        assert relays_now() == []
        first, second = party.caller(b"first"), party.caller(b"second")
        assert relays_now() == ["shmtransport zmq"]
        party.server.disconnect(first.name)
        assert relays_now() == ["shmtransport zmq"]
        second.channel.send(b"x")
        assert party.next_message() == (b"second", b"x")
        party.server.disconnect(second.name)
        assert relays_now() == []
        zmq_client = party.zmq_client()
        zmq_client.send(b"without a relay")
        assert party.next_message()[1] == b"without a relay"


def test_in_event_loops_a_relay_waits_with_each_bell(relays_now: RelaysNow, looped: Party) -> None:
    """One for the server while it has doorbell clients, one for a client from ``fileno`` to ``close``."""
    assert relays_now() == []
    caller = looped.caller()
    assert relays_now() == ["shmtransport doorbell"]
    caller.channel.fileno()
    assert relays_now() == ["shmtransport doorbell"] * 2
    looped.server.disconnect(caller.name)
    assert relays_now() == ["shmtransport doorbell"]
    caller.channel.close(flush=False)
    assert relays_now() == []


def test_a_server_without_a_thread_for_its_relay_can_be_closed(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the cause; closing frees what there is."""

    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(OutOfResources, match="can't start"):
            party.server.prepare()
    party.server.close()


def _used(caller: Caller, party: Party) -> None:
    caller.channel.send(b"to the server")
    assert party.next_message()[1] == b"to the server"
    party.server.send(caller.name, b"to the client")
    assert next_message(caller) == b"to the client"


@pytest.mark.parametrize("first", ["server", "client"])
@pytest.mark.parametrize("in_loop", [False, True])
def test_either_side_may_close_first_and_twice(relays_now: RelaysNow, party: Party, first: str, in_loop: bool) -> None:
    """In use, in an event loop or not; the other side learns of it, and closing again does nothing."""
    caller = party.caller()
    if in_loop:
        caller.channel.fileno()
    _used(caller, party)
    for _ in range(2):
        if first == "server":
            party.server.close()
            assert caller.channel.receive() is None
            assert caller.channel.ended()
        else:
            caller.channel.close(flush=True)
            assert caller.server_ring.ended()
    caller.channel.close(flush=False)
    party.server.close()
    caller.channel.wake()
    party.server.wake()
    assert relays_now() == []


@pytest.mark.parametrize("in_loop", [False, True])
def test_closing_a_server_ends_relays_that_wait(relays_now: RelaysNow, in_loop: bool, address: str) -> None:
    """The relay may be blocked at any point of its loop: closing interrupts it, again and again."""
    for number in range(20):
        party = Party(address, doorbells=LoopDoorbells if in_loop else ThreadDoorbells)
        caller = party.caller()
        if number % 2:
            caller.channel.send(b"unread")
            party.server.wake()
        party.close()
        assert relays_now() == []


def test_a_server_that_waits_is_woken_to_be_closed(party: Party) -> None:
    """As ``stop`` does from another thread: wake it, let it return, close it."""
    caller = party.caller()
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            party.server.wait(None)
            while party.server.receive() is not None:
                pass
        party.server.close()

    work = in_thread(serve)
    caller.channel.send(b"x")
    stopping.set()
    party.server.wake()
    work.result(30.0)
    assert caller.channel.ended()


def test_a_client_that_waits_is_woken_to_be_closed(party: Party) -> None:
    """Waking it ends its wait, and then it can be closed."""
    caller = party.caller()
    closing = threading.Event()

    def wait() -> None:
        while not closing.is_set():
            caller.channel.wait(60.0)

    work = in_thread(wait)
    closing.set()
    caller.channel.wake()
    work.result(30.0)
    caller.channel.close(flush=False)
    assert caller.server_ring.ended()


def _in_child(work: Callable[[], None]) -> int:
    """Run this in a forked child; return the exit code, 0 if it succeeded."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a test's failure must not go on in the child
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("side", ["client", "server", "server without clients"])
def test_in_a_forked_child_nothing_reaches_the_other_side(party: Party, side: str) -> None:
    """A child wakes and closes what it has abandoned: neither its parent nor the peer notices."""

    def use_the_server() -> None:
        party.server.abandon()
        party.server.wake()
        party.server.close()

    def use_the_client() -> None:
        caller.channel.abandon()
        caller.channel.wake()
        caller.channel.close(flush=True)

    if side == "server without clients":
        assert _in_child(use_the_server) == 0
    caller = party.caller()
    _used(caller, party)
    caller.ring.take_post()
    if side != "server without clients":
        assert _in_child(use_the_client if side == "client" else use_the_server) == 0
    assert not caller.channel.ended()
    assert not caller.server_ring.ended()
    assert not caller.ring.take_post()
    assert not party.base.wait(0)
    assert party.base.receive() is None  # that look may have kept the relay from an event, which tells of a change only
    _used(caller, party)
    assert party.zmq_client().send(b"by ZeroMQ as well")
    assert party.next_message()[1] == b"by ZeroMQ as well"
