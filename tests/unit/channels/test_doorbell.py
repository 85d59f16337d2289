"""The doorbell channel: order, full rings and queues, fairness, broken peers, and lost or needless rings."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shmtransport.channels import relay
from shmtransport.channels.backlog import QUEUE_LIMIT
from shmtransport.channels.base import BrokenPeer
from shmtransport.errors import MessageTooLarge, PeerProtocolError
from tests.support.doorbells import MAX_MESSAGE_BYTES, Caller, Party, all_messages, next_message
from tests.support.helpers import eventually, in_thread
from tests.support.rings import CONSUMED, POSTS, PUBLISHED, SLEEPS, Forger

LARGEST = bytes(MAX_MESSAGE_BYTES)  # two fill a ring

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("never_looks_again")]


@pytest.fixture
def party(address: str) -> Iterator[Party]:
    made = Party(address)
    yield made
    made.close()


@pytest.fixture
def caller(party: Party) -> Caller:
    return party.caller()


def _numbered(count: int, size: int = MAX_MESSAGE_BYTES) -> list[bytes]:
    return [number.to_bytes(4, "little").ljust(size, b"x") for number in range(count)]


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_of_any_size_go_both_ways_in_order(party: Party, caller: Caller) -> None:
    """Client and server run in a thread each, and wait when there is nothing: all messages arrive, whole, in order."""
    messages = [random.Random(seed).randbytes(seed % (MAX_MESSAGE_BYTES + 1)) for seed in range(0, 300_000, 997)]
    messages += [b"", b"", LARGEST]

    def echo() -> None:
        for _ in messages:
            name, data = party.next_message()
            assert party.server.send(name, data)

    work = in_thread(echo)
    received = []
    for message in messages:
        while not caller.channel.send(message):
            caller.channel.wait(60.0)
        received += all_messages(caller)
    while len(received) < len(messages):
        received.append(next_message(caller))
    assert received == messages
    work.result(30.0)


def test_the_server_knows_who_sent_what(party: Party) -> None:
    """Each message comes with its client's name, and an answer goes to that client alone."""
    callers = [party.caller(name) for name in (b"one", b"two", b"three")]
    for caller in callers:
        caller.channel.send(caller.name)
    for _ in callers:
        name, data = party.next_message()
        assert name == data
        assert party.server.channel_of(name) == "doorbell"
        assert party.server.send(name, b"to " + name)
    assert [all_messages(caller) for caller in callers] == [[b"to one"], [b"to two"], [b"to three"]]


def test_both_kinds_of_clients_are_served(party: Party, caller: Caller) -> None:
    """One server channel serves both; sending to an unknown client fails, and its end does nothing."""
    zmq_client = party.zmq_client()
    zmq_client.send(b"by zmq")
    caller.channel.send(b"by doorbell")
    received = dict(party.next_message()[::-1] for _ in range(2))
    assert received.keys() == {b"by zmq", b"by doorbell"}
    identity = received[b"by zmq"]
    assert party.server.channel_of(identity) == "zmq"
    assert party.server.send(identity, b"answer")
    assert eventually(lambda: zmq_client.receive() == b"answer")
    assert not party.server.send(b"nobody", b"answer")
    party.server.disconnect(b"nobody")
    party.server.disconnect(identity)
    assert party.server.send(identity, b"a goodbye still passes")


def test_a_message_that_never_fits_is_not_sent(party: Party, caller: Caller) -> None:
    """The client gets an error, the server False, as it is no reply; messages before and after it are sent."""
    caller.channel.send(b"before")
    with pytest.raises(MessageTooLarge, match=f"a message of {MAX_MESSAGE_BYTES + 1} bytes"):
        caller.channel.send(LARGEST + b"x")
    caller.channel.send(b"after")
    assert [party.next_message()[1] for _ in range(2)] == [b"before", b"after"]
    messages = [b"before", LARGEST + b"x", b"after"]
    assert [party.server.send(caller.name, message) for message in messages] == [True, False, True]
    assert all_messages(caller) == [b"before", b"after"]


# --- full rings -------------------------------------------------------------------------------------------------------


def test_a_message_longer_than_agreed_is_the_senders_error(party: Party, caller: Caller) -> None:
    """A ring has room for two of the largest; one of twice the size is refused on either side."""
    capacity = caller.forger.capacity
    caller.forger.set_records(struct.pack("<I", capacity - 4).ljust(capacity, b"\0"))
    caller.forger.set_cell(PUBLISHED, capacity)
    with pytest.raises(BrokenPeer, match=f"a message of {capacity - 4} bytes; {caller.ring.largest_message} were"):
        party.server.receive()
    server = Forger(caller._segments[1], capacity)
    server.set_records(struct.pack("<I", capacity - 4).ljust(capacity, b"\0"))
    server.set_cell(PUBLISHED, capacity)
    with pytest.raises(PeerProtocolError, match=f"a message of {capacity - 4} bytes"):
        caller.channel.receive()


def test_a_client_is_told_when_the_server_has_read_on(party: Party, caller: Caller) -> None:
    """Without room ``send`` is False; the server rings once it has read, and then there is room."""
    messages = _numbered(3)
    assert [caller.channel.send(message) for message in messages] == [True, True, False]
    assert not caller.ring.take_post()
    assert party.next_message()[1] == messages[0]
    assert caller.ring.take_post(), "the client was not told"
    assert caller.channel.send(messages[2])
    assert [party.next_message()[1] for _ in range(2)] == messages[1:]
    assert not caller.ring.take_post(), "the client was told although it no longer waits"


def test_room_that_is_made_just_before_it_is_asked_for_is_used(
    party: Party, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads between the client's failed attempt and its request to be told: no wait is needed."""
    messages = _numbered(3)
    for message in messages[:2]:
        assert caller.channel.send(message)

    class ReadFirst:
        """The client's ring, with a read by the server in the middle of its request."""

        def __getattr__(self, name: str) -> Any:
            return getattr(caller.ring, name)

        def want_room(self, wanted: bool) -> None:
            if wanted:
                assert party.next_message()[1] == messages[0]
            caller.ring.want_room(wanted)

    monkeypatch.setattr(caller.channel, "_ring", ReadFirst())
    assert caller.channel.send(messages[2])
    assert [party.next_message()[1] for _ in range(2)] == messages[1:]
    assert not caller.ring.take_post(), "the client was told although it does not wait"


def test_the_server_queues_what_a_ring_has_no_room_for(party: Party, caller: Caller) -> None:
    """It never blocks; once the client has read, the rest follows. Messages sent before that must queue as well."""
    messages = [*_numbered(9), b"small", *_numbered(3)]
    for message in messages:
        assert party.server.send(caller.name, message)
    received: list[bytes] = []
    while len(received) < len(messages):
        new = all_messages(caller)
        assert new, "the server was not told that there is room"
        received += new
        if len(messages) < 20:
            messages.append(b"late")
            assert party.server.send(caller.name, b"late")
        if not party.server.is_queue_empty:
            party.server.wait(None)
        assert party.server.receive() is None
    assert received == messages
    party.server.send(caller.name, b"directly")
    assert all_messages(caller) == [b"directly"]


@pytest.mark.parametrize(("size", "limit"), [(0, QUEUE_LIMIT), (64 << 10, 256)], ids=["messages", "bytes"])
def test_a_client_that_does_not_read_is_given_up_at_a_limit(address: str, size: int, limit: int) -> None:
    """10 000 messages or 16 MiB are queued for it beyond what its ring takes; the next ``send`` is False."""
    party = Party(address, max_message_bytes=64 << 10)
    caller = party.caller()
    try:
        while caller.server_ring.write(bytes(size)):
            pass
        assert sum(party.server.send(caller.name, bytes(size)) for _ in range(limit)) == limit
        assert not party.server.send(caller.name, bytes(size))
    finally:
        party.close()


# --- fairness ---------------------------------------------------------------------------------------------------------


def test_no_doorbell_client_starves_another(party: Party) -> None:
    """While two clients always have messages waiting, a third's message is at most the third to be received."""
    loud, quiet = [party.caller(b"loud"), party.caller(b"louder")], party.caller(b"quiet")
    for _ in range(20):
        quiet.channel.send(b"please")
        names = []
        for _ in range(3):
            for caller in loud:
                caller.channel.send(LARGEST)
            names.append(party.next_message()[0])
        assert sorted(names) == [b"loud", b"louder", b"quiet"]


def test_doorbell_clients_do_not_starve_zmq_clients(party: Party, caller: Caller) -> None:
    """While a ring is never empty, the server still receives messages by ZeroMQ."""
    zmq_client = party.zmq_client()
    for message in _numbered(20, 4):
        zmq_client.send(message)
    received: list[bytes] = []

    def receive_one() -> bool:
        while caller.channel.send(b"again"):
            pass
        name, data = party.next_message()
        if name != caller.name:
            received.append(data)
        return len(received) == 20

    assert eventually(receive_one)
    assert received == _numbered(20, 4)


def test_zmq_clients_do_not_starve_doorbell_clients(party: Party, caller: Caller) -> None:
    """While hundreds of messages wait in the socket, one by doorbell is at most the second to be received."""
    zmq_client = party.zmq_client()
    for message in _numbered(500, 4):
        zmq_client.send(message)
    for _ in range(100):
        caller.channel.send(b"please")
        assert caller.name in [party.next_message()[0] for _ in range(2)]


# --- broken peers -----------------------------------------------------------------------------------------------------


def test_a_broken_ring_costs_its_owner_the_connection_and_others_nothing(party: Party) -> None:
    """``receive`` names the client to drop; after that the server serves all others."""
    broken, sound = party.caller(b"broken"), party.caller(b"sound")
    broken.forger.set_cell(PUBLISHED, 2**63)
    sound.channel.send(b"before")
    with pytest.raises(BrokenPeer, match="published") as caught:
        party.next_message()
    assert caught.value.client_key == b"broken"
    assert isinstance(caught.value.error, PeerProtocolError)
    assert str(caught.value) == str(caught.value.error)
    party.server.disconnect(b"broken")
    assert party.next_message() == (b"sound", b"before")
    sound.channel.send(b"after")
    assert party.next_message() == (b"sound", b"after")


def test_a_broken_count_of_what_was_read_is_found_by_sending(party: Party, caller: Caller) -> None:
    """``send`` itself reports it or, where something is queued, the next ``receive``."""
    for _ in range(3):
        party.server.send(caller.name, LARGEST)
    caller.forger.set_cell(CONSUMED, 2**64 - 1)
    for attempt in (lambda: party.server.send(caller.name, b"x"), party.server.receive, party.server.receive):
        with pytest.raises(BrokenPeer, match="has read 18446744073709551615 bytes") as caught:
            attempt()
        assert caught.value.client_key == caller.name


def test_a_message_as_large_as_two_is_none(party: Party, caller: Caller) -> None:
    """A ring takes two of the largest; records joined into a larger one are the fault of the ring's owner."""
    for write, forger in ((caller.ring.write, caller.forger), (caller.server_ring.write, caller.server_forger)):
        assert write(LARGEST)
        assert write(LARGEST)
        forger.set_length(0, 2 * MAX_MESSAGE_BYTES)
    with pytest.raises(BrokenPeer, match="a message of 2040 bytes; 1020 were agreed") as caught:
        party.next_message()
    assert caught.value.client_key == caller.name
    with pytest.raises(PeerProtocolError, match="a message of 2040 bytes; 1020 were agreed"):
        caller.channel.receive()


def test_a_client_is_told_of_its_end(party: Party) -> None:
    """Its wait ends, it receives what was sent before, then it has ended; a new client may use that name."""
    for _ in range(2):
        caller = party.caller(b"again and again")
        party.server.send(caller.name, b"last words")
        party.server.disconnect(caller.name)
        assert party.server.channel_of(caller.name) == "zmq"
        assert not caller.channel.ended()
        assert [next_message(caller), caller.channel.receive()] == [b"last words", None]
        assert caller.channel.ended()


def test_a_goodbye_passes_where_the_ring_is_full(party: Party) -> None:
    """It goes by ZeroMQ, from a client as well as to one: the peer's ring may be the broken part."""
    caller = party.caller()
    while caller.channel.send(bytes(1020)):
        pass
    caller.channel.say_goodbye(b"goodbye")
    received = [party.next_message()[1] for _ in range(3)]
    assert sorted(received) == sorted([b"goodbye", bytes(1020), bytes(1020)])


# --- posts ------------------------------------------------------------------------------------------------------------


def test_messages_that_are_found_by_looking_need_no_post(party: Party, caller: Caller) -> None:
    """A side that does not sleep is never posted."""
    for _ in range(200):
        caller.channel.send(b"x")
        party.server.send(caller.name, b"y")
        assert party.next_message() == (caller.name, b"x")
        assert caller.channel.receive() == b"y"
    assert not caller.ring.take_post()
    assert not caller.server_ring.take_post()


def test_a_post_that_was_waited_for_is_used_up(party: Party, caller: Caller) -> None:
    """A message that wakes a sleeping client leaves no post behind."""
    for _ in range(3):
        later = threading.Timer(0.02, party.server.send, [caller.name, b"wake up"])
        later.start()
        assert next_message(caller) == b"wake up"
        later.join()
        caller.channel.wait(0.0)
        assert not caller.ring.take_post()


@pytest.mark.parametrize("waiting", ["client", "server"])
def test_a_peer_that_never_posts_delays_its_messages_and_loses_none(
    party: Party, caller: Caller, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sleeping side looks by itself from time to time: in this test no post arrives at all."""
    monkeypatch.setattr(relay, "SLICE_S", 0.05)
    if waiting == "client":
        work = in_thread(lambda: [next_message(caller) for _ in range(2)])
        waiter, ring = caller.forger, caller.server_ring
    else:
        work = in_thread(lambda: [party.next_message() for _ in range(2)])
        waiter, ring = caller.server_forger, caller.ring
    for _ in range(2):
        waiter.set_cell(SLEEPS, 0)
        assert ring.write(b"silent")
    work.result(30.0)


def test_posts_without_a_message_are_harmless(party: Party, caller: Caller) -> None:
    """Each of them causes a needless wake-up; afterwards messages pass as before."""
    for number in range(100):
        caller.channel.wake()
        party.server.bell.post()
        for forger in (caller.forger, caller.server_forger):
            forger.set_cell(POSTS, 7 * number)
    for message in _numbered(200, 4):
        assert caller.channel.send(message)
        assert party.next_message() == (caller.name, message)
        assert party.server.send(caller.name, message)
        assert next_message(caller) == message


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_spinning_client_finds_a_message_without_the_kernel(party: Party) -> None:
    """``wait`` returns False, as it didn't block; without a message it blocks next, for as long as it was asked to."""
    spinning = party.caller(b"spinning", spin_us=60e6)
    later = threading.Timer(0.02, party.server.send, [spinning.name, b"found"])
    later.start()
    assert not spinning.channel.wait(60.0)
    assert spinning.channel.receive() == b"found"
    later.join()
    brief = party.caller(b"brief", spin_us=1.0)
    assert brief.channel.wait(0.0)


def test_a_spinning_server_finds_a_message_without_the_kernel(address: str) -> None:
    """Without waiting in the kernel; a server that doesn't spin, or not long enough, has waited there."""
    for spin_us, blocked in ((60e6, False), (1.0, True), (0.0, True)):
        party = Party(address, spin_us)
        caller = party.caller()
        try:
            waits = party.server.waits
            later = threading.Timer(0.02, caller.channel.send, [b"found"])
            later.start()
            assert party.next_message() == (caller.name, b"found")
            later.join()
            assert (party.server.waits > waits) == blocked
        finally:
            party.close()


def test_anyone_may_wake_a_waiting_client(caller: Caller) -> None:
    """Its wait ends although there is nothing to receive."""
    work = in_thread(lambda: caller.channel.wait(60.0))
    caller.channel.wake()
    work.result(30.0)
    assert caller.channel.receive() is None


@pytest.mark.parametrize("with_callers", [False, True])
def test_anyone_may_wake_a_waiting_server(party: Party, with_callers: bool) -> None:
    """Its wait ends, with doorbell clients and without, by ``wake`` and by a byte to its descriptor."""
    if with_callers:
        party.caller()
    woken = threading.Event()

    def wait_for_it() -> None:
        while not woken.is_set():
            party.server.wait(None)

    for wake in (party.server.wake, lambda: os.write(party.server.wake_descriptor, b"\0")):
        woken.clear()
        work = in_thread(wait_for_it)
        woken.set()
        wake()
        work.result(30.0)
