"""The doorbell channel: order, full rings and queues, fairness, broken peers, and rings that are lost or too many."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Iterator

import pytest

from shmtransport import doorbell
from shmtransport.backlog import QUEUE_LIMIT
from shmtransport.channel import BrokenPeer
from shmtransport.errors import MessageTooLarge, PeerProtocolError

from .doorbells import MAX_MESSAGE_BYTES, Caller, Party, all_messages, ended, eventually, in_thread, next_message
from .rings import CONSUMED, PUBLISHED, Forger

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
    """Client and server each in a thread, waiting whenever there is nothing: all arrive, whole, in order."""
    messages = [random.Random(seed).randbytes(seed % (MAX_MESSAGE_BYTES + 1)) for seed in range(0, 300_000, 997)]
    messages += [b"", b"", LARGEST]

    def echo() -> None:
        for _ in messages:
            name, data = party.next_message()
            assert party.server.send(name, data)

    thread = in_thread(echo)
    received = []
    for message in messages:
        while not caller.channel.send(message):
            caller.channel.wait(60.0)
        received += all_messages(caller)
    while len(received) < len(messages):
        received.append(next_message(caller))
    assert received == messages
    assert ended(thread)


def test_the_server_knows_who_sent_what(party: Party) -> None:
    """Each message comes with the name of its client, and an answer goes to that one alone."""
    callers = [party.caller(name) for name in (b"one", b"two", b"three")]
    for caller in callers:
        caller.channel.send(caller.name)
    for _ in callers:
        name, data = party.next_message()
        assert name == data
        assert party.server.kind_of(name) == "doorbell"
        assert party.server.send(name, b"to " + name)
    assert [all_messages(caller) for caller in callers] == [[b"to one"], [b"to two"], [b"to three"]]


def test_both_kinds_of_clients_are_served(party: Party, caller: Caller) -> None:
    """One server channel for both; a client that nobody knows can't be sent to, and its end is nothing."""
    zmq_client = party.zmq_client()
    zmq_client.send(b"by zmq")
    caller.channel.send(b"by doorbell")
    received = dict(party.next_message()[::-1] for _ in range(2))
    assert received.keys() == {b"by zmq", b"by doorbell"}
    identity = received[b"by zmq"]
    assert party.server.kind_of(identity) == "zmq"
    assert party.server.send(identity, b"answer")
    assert eventually(lambda: zmq_client.receive() == b"answer")
    assert not party.server.send(b"nobody", b"answer")
    party.server.disconnect(b"nobody")
    party.server.disconnect(identity)
    assert party.server.send(identity, b"a goodbye still passes")


def test_a_message_that_never_fits_is_not_sent(party: Party, caller: Caller) -> None:
    """An error for a client; False from a server, for whom it is no reply; what comes before and after is sent."""
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
    """Without room ``send`` is False; the server's reading rings, and then there is room."""
    messages = _numbered(3)
    assert [caller.channel.send(message) for message in messages] == [True, True, False]
    assert not caller.bell.take()
    assert party.next_message()[1] == messages[0]
    assert caller.bell.take(), "the client was not told"
    assert caller.channel.send(messages[2])
    assert [party.next_message()[1] for _ in range(2)] == messages[1:]
    assert not caller.bell.take(), "the client was told although it no longer waits"


def test_room_that_is_made_just_before_it_is_asked_for_is_used(
    party: Party, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads between the client's failed attempt and its request to be told: no wait is needed."""
    messages = _numbered(3)
    for message in messages[:2]:
        assert caller.channel.send(message)
    want_room = caller.ring.want_room

    def read_first(wanted: bool) -> None:
        if wanted:
            assert party.next_message()[1] == messages[0]
        want_room(wanted)

    monkeypatch.setattr(caller.ring, "want_room", read_first)
    assert caller.channel.send(messages[2])
    assert [party.next_message()[1] for _ in range(2)] == messages[1:]
    assert not caller.bell.take(), "the client was told although it does not wait"


def test_the_server_queues_what_a_ring_has_no_room_for(party: Party, caller: Caller) -> None:
    """It never blocks; when the client has read on, the rest follows. What is sent then has to queue as well."""
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
    """While two have always something to say, each message of a third is the next but two at most."""
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
    """While a ring is never empty, messages by ZeroMQ are received all the same."""
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
    """While hundreds of messages wait in the socket, one by doorbell is the next but one at most."""
    zmq_client = party.zmq_client()
    for message in _numbered(500, 4):
        zmq_client.send(message)
    for _ in range(100):
        caller.channel.send(b"please")
        assert caller.name in [party.next_message()[0] for _ in range(2)]


# --- broken peers -----------------------------------------------------------------------------------------------------


def test_a_broken_ring_costs_its_owner_the_connection_and_others_nothing(party: Party) -> None:
    """``receive`` names who is to be dropped; once it was, all others are served."""
    broken, sound = party.caller(b"broken"), party.caller(b"sound")
    broken.forger.set_cell(PUBLISHED, 2**63)
    sound.channel.send(b"before")
    with pytest.raises(BrokenPeer, match="published") as caught:
        party.next_message()
    assert caught.value.peer == b"broken"
    assert isinstance(caught.value.error, PeerProtocolError)
    assert str(caught.value) == str(caught.value.error)
    party.server.disconnect(b"broken")
    assert party.next_message() == (b"sound", b"before")
    sound.channel.send(b"after")
    assert party.next_message() == (b"sound", b"after")


def test_a_broken_count_of_what_was_read_is_found_by_sending(party: Party, caller: Caller) -> None:
    """By ``send`` itself, or, where something is queued, by the next ``receive``."""
    for _ in range(3):
        party.server.send(caller.name, LARGEST)
    caller.forger.set_cell(CONSUMED, 2**64 - 1)
    for attempt in (lambda: party.server.send(caller.name, b"x"), party.server.receive, party.server.receive):
        with pytest.raises(BrokenPeer, match="has read 18446744073709551615 bytes") as caught:
            attempt()
        assert caught.value.peer == caller.name


def test_a_message_as_large_as_two_is_none(party: Party, caller: Caller) -> None:
    """A ring takes two of the largest; records that were joined into a larger one are their owner's fault."""
    for write, forger in ((caller.ring.write, caller.forger), (caller.server_ring.write, caller.server_forger)):
        assert write(LARGEST)
        assert write(LARGEST)
        forger.set_length(0, 2 * MAX_MESSAGE_BYTES)
    with pytest.raises(BrokenPeer, match="a message of 2040 bytes; 1020 were agreed") as caught:
        party.next_message()
    assert caught.value.peer == caller.name
    with pytest.raises(PeerProtocolError, match="a message of 2040 bytes; 1020 were agreed"):
        caller.channel.receive()


def test_a_client_is_told_of_its_end(party: Party) -> None:
    """Its wait ends, what was sent before is received, then it has ended; a new client may come by that name."""
    for _ in range(2):
        caller = party.caller(b"again and again")
        party.server.send(caller.name, b"last words")
        party.server.disconnect(caller.name)
        assert party.server.kind_of(caller.name) == "zmq"
        assert not caller.channel.ended()
        assert [next_message(caller), caller.channel.receive()] == [b"last words", None]
        assert caller.channel.ended()


def test_a_goodbye_passes_where_the_ring_is_full(party: Party) -> None:
    """It goes by ZeroMQ, from a client as to one: the peer's ring may be the very thing that is broken."""
    caller = party.caller()
    while caller.channel.send(bytes(1020)):
        pass
    caller.channel.say_goodbye(b"goodbye")
    received = [party.next_message()[1] for _ in range(3)]
    assert sorted(received) == sorted([b"goodbye", bytes(1020), bytes(1020)])


# --- rings ------------------------------------------------------------------------------------------------------------


def test_rings_of_messages_that_were_found_by_looking_are_taken_back(party: Party, caller: Caller) -> None:
    """Otherwise each would later wake somebody for nothing, and their number could only grow."""
    for _ in range(200):
        caller.channel.send(b"x")
        party.server.send(caller.name, b"y")
        assert party.next_message() == (caller.name, b"x")
        assert caller.channel.receive() == b"y"
    caller.channel.wait(0.0)
    party.server.wait(0.0)
    assert not caller.bell.take()
    assert sum(party.server.bell().take() for _ in range(200)) < 100  # some, since there is something by ZeroMQ


def test_a_ring_that_was_waited_for_is_used_up(party: Party, caller: Caller) -> None:
    """A message that wakes a sleeping client leaves no ring behind."""
    for _ in range(3):
        later = threading.Timer(0.02, party.server.send, [caller.name, b"wake up"])
        later.start()
        assert next_message(caller) == b"wake up"
        later.join()
        caller.channel.wait(0.0)
        assert not caller.bell.take()


@pytest.mark.parametrize("waiting", ["client", "server"])
def test_a_ring_that_a_stranger_takes_away_delays_and_loses_nothing(
    party: Party, caller: Caller, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sleeps looks by itself now and then: here nobody rings at all."""
    monkeypatch.setattr(doorbell, "_SLICE_S", 0.05)
    if waiting == "client":
        thread = in_thread(lambda: [next_message(caller) for _ in range(2)])
        ring = caller.server_ring
    else:
        thread = in_thread(lambda: [party.next_message() for _ in range(2)])
        ring = caller.ring
    for _ in range(2):
        assert ring.write(b"silent")
    assert ended(thread)


def test_rings_without_a_message_are_harmless(party: Party, caller: Caller) -> None:
    """Any number of them wakes for nothing; afterwards messages are as before."""
    for _ in range(100):
        caller.bell.ring()
        party.server.bell().ring()
    for number in _numbered(200, 4):
        assert caller.channel.send(number)
        assert party.next_message() == (caller.name, number)
        assert party.server.send(caller.name, number)
        assert next_message(caller) == number


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_spinning_client_finds_a_message_without_the_kernel(party: Party) -> None:
    """``wait`` says so; without anything to find it goes on to block, for as long as it was asked to."""
    spinning = party.caller(b"spinning", spin_us=60e6)
    later = threading.Timer(0.02, party.server.send, [spinning.name, b"found"])
    later.start()
    assert not spinning.channel.wait(60.0)
    assert spinning.channel.receive() == b"found"
    later.join()
    brief = party.caller(b"brief", spin_us=1.0)
    assert brief.channel.wait(0.0)


def test_a_spinning_server_finds_a_message_without_the_kernel(address: str) -> None:
    """It has not waited in the kernel; one that does not spin, or not long enough, has."""
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
    thread = in_thread(lambda: caller.channel.wait(60.0))
    caller.channel.wake()
    assert ended(thread)
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
        thread = in_thread(wait_for_it)
        woken.set()
        wake()
        assert ended(thread)
