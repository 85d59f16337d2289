"""Clients that attack a server by sheer number: of connections, handshakes, messages or unread replies."""

from __future__ import annotations

import itertools
import os
import time

import zmq

from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    Attach,
    Failure,
    Goodbye,
    Hello,
    Offer,
    Refused,
    Reply,
    encode,
)
from tests.support.helpers import eventually

from .attacks import NOWHERE, hello_by, hello_for
from .harness import HANDSHAKE_TIMEOUT_S, MAX_CLIENTS
from .peers import ANSWER_S, Impostor, Raw, Wire, request
from .scene import BOTH, Scene, attack

SOCKETS = 300
HELLOS = 3000
MESSAGES = 10_000


def try_to_send(wire: Wire, data: bytes) -> bool:
    """Try to send one message; return whether the sender's own queue had room for it."""
    try:
        wire.socket.send(data, zmq.DONTWAIT)
    except zmq.Again:
        time.sleep(0.0005)
        return False
    return True


def descriptors(scene: Scene) -> int:
    return len(os.listdir(f"/proc/{scene.server_pid}/fd"))


# --- handshakes and connections ---------------------------------------------------------------------------------------


@attack(*BOTH)
def hellos_without_end(scene: Scene) -> None:
    """Thousands of Hellos from few sockets, alternately a first and a second one: none gets further than an offer."""
    wires = [scene.wire() for _ in range(4)]
    for _ in range(0, HELLOS, 80):
        for wire in wires:
            for _ in range(20):
                wire.send(hello_by(scene))
        answers = [wire.hear() for wire in wires for _ in range(20)]
        assert all(isinstance(answer, (Offer, Refused)) for answer in answers)
    for wire in wires:
        wire.send(Goodbye(""))


@attack("zmq")
def handshakes_that_are_never_finished(scene: Scene) -> None:
    """Several hundred clients say Hello and wait: max_clients holds, nothing is allocated, their time runs out.

    Half of them ask for one channel, half for the other.
    """
    before, started = descriptors(scene), time.monotonic()
    wires = [scene.wire() for _ in range(SOCKETS)]
    for wire, channel in zip(wires, itertools.cycle(BOTH)):
        wire.send(hello_for(channel))
    answers = [wire.hear() for wire in wires]
    offers = sum(isinstance(answer, Offer) for answer in answers)
    refusals = [answer.reason for answer in answers if isinstance(answer, Refused)]
    assert offers + len(refusals) == SOCKETS
    at_once = MAX_CLIENTS - 2  # the innocent ones are there already
    assert 1 <= offers <= at_once * (1 + (time.monotonic() - started) // HANDSHAKE_TIMEOUT_S)
    assert all("max_clients" in reason for reason in refusals)
    assert descriptors(scene) <= before + SOCKETS
    late = scene.wire()
    assert eventually(lambda: isinstance(late.ask(hello_by(scene)), Offer))
    late.send(Goodbye(""))


@attack("zmq")
def attaches_that_come_too_late(scene: Scene) -> None:
    """A client that attaches after the handshake's time has run out is unknown to the server, on either channel."""
    wires = [scene.wire() for _ in range(MAX_CLIENTS - 2)]
    assert all(isinstance(wire.ask(hello_for(channel)), Offer) for wire, channel in zip(wires, itertools.cycle(BOTH)))
    time.sleep(HANDSHAKE_TIMEOUT_S + 0.05)
    for wire in wires:
        assert isinstance(wire.ask(Attach(NOWHERE)), Goodbye)


@attack("zmq")
def sockets_that_say_nothing(scene: Scene) -> None:
    """Several hundred connections that say nothing, half of ZeroMQ's greeting, or noise instead of it."""
    starts = (b"", Raw.GREETING[:11], Raw.GREETING, b"GET / HTTP/1.1\r\n\r\n", os.urandom(200), b"\xff" * 64, bytes(64))
    for turn in range(SOCKETS):
        scene.raw().write(starts[turn % len(starts)])


@attack("zmq")
def frames_that_are_none(scene: Scene) -> None:
    """ZeroMQ's own frames with impossible lengths, unknown commands, forged identities: ZeroMQ closes or ignores."""
    known = encode(hello_by(scene))
    for wrong in (
        b"\x02" + b"\xff" * 8 + b"x" * 100,  # a frame of 2**64 - 1 bytes
        b"\x02" + b"\x7f" + b"\xff" * 7 + b"x" * 100,
        b"\x02" + (DEFAULT_MAX_MESSAGE_BYTES + 1).to_bytes(8, "big") + bytes(DEFAULT_MAX_MESSAGE_BYTES + 1),
        b"\x04\x05\x04NONE",  # an unknown command
        b"\x04\x00",
        b"\xf8" + b"x" * 100,  # reserved flags
        b"\x00\xff" + b"x" * 10,  # a frame that is never finished
    ):
        one = scene.raw()
        one.greet()
        one.write(wrong)
    for identity in (b"x", b"x", b"x" * 255, b"\0", bytes(5)):
        one = scene.raw()
        one.greet(identity)
        one.say(known)
    one = scene.raw()
    one.greet()
    one.say(known)
    answer = encode(Offer(DEFAULT_MAX_MESSAGE_BYTES))
    received = one.hear_all(answer)
    assert answer in received, received
    one.say(encode(Goodbye("")))


@attack("zmq")
def too_long_a_frame(scene: Scene) -> None:
    """A message longer than agreed, by a stranger: ZeroMQ closes the connection before the message is complete."""
    one = scene.raw()
    one.greet()
    one.say(bytes(DEFAULT_MAX_MESSAGE_BYTES + 1))
    assert one.is_closed()


@attack(*BOTH)
def clients_that_come_and_go(scene: Scene) -> None:
    """Connections one after the other, each ended in another way; nothing of them stays."""
    for turn in range(60):
        one = scene.impostor()
        if turn % 3 == 0:
            one.send(b"noise")
        elif turn % 3 == 1:
            one.send(request(4000, 1.0, method="fill"))
            one.send(Goodbye(""))
        else:
            one.assert_served()
            one.wire.send(Goodbye(""))


@attack("zmq")
def clients_that_leave_without_a_goodbye(scene: Scene) -> None:
    """They give their segments up and say nothing more while their process lives on: their places become free.

    Half of them are clients by one channel, half by the other.
    """
    for channel in BOTH * 4:
        one = scene.impostor(channel=channel)
        one.assert_served()
        one.segment.close()
    assert eventually(lambda: not is_client(scene, one))


# --- messages ---------------------------------------------------------------------------------------------------------


@attack("zmq")
def garbage_without_end(scene: Scene) -> None:
    """Thousands of large messages of noise from several strangers that never read the answers."""
    noise, wires = os.urandom(60_000), [scene.wire(queue=8) for _ in range(4)]
    sent = 0
    while sent < MESSAGES // 4:
        sent += sum(try_to_send(wire, noise) for wire in wires)
    small = [scene.wire(queue=8) for _ in range(4)]
    while sent < MESSAGES:
        sent += sum(try_to_send(wire, b"noise") for wire in small)


def unread(one: Impostor, size: int, most: int) -> int:
    """Make up to ``most`` calls with replies of this size, until the server ends the connection; return how many."""
    data, made = encode(request("x" * size)), 0
    until = time.monotonic() + 10.0
    while made < most and time.monotonic() < until:
        if one.channel == "zmq":
            made += try_to_send(one.wire, data)
            continue
        if one.ended():
            break
        if one.ring.write(data):
            made += 1
            one.forger.post()
        else:
            time.sleep(0.0005)
    return made


@attack(*BOTH)
def large_replies_left_unread(scene: Scene) -> None:
    """Calls with the largest possible replies, none of them read: the client is dropped before that takes much room."""
    one = scene.impostor(queue=8)
    unread(one, 60_000, 2000)
    assert eventually(lambda: not is_client(scene, one))


def is_client(scene: Scene, one: Impostor) -> bool:
    """Whether this client still takes up one of the server's places for clients."""
    wires = [scene.wire() for _ in range(MAX_CLIENTS - 2)]
    answers = [wire.ask(Hello(4096, 4096, 65536)) for wire in wires]
    for wire in wires:
        wire.send(Goodbye(""))
        wire.close()
    return not all(isinstance(answer, Offer) for answer in answers)


@attack("zmq")
def unread_replies_of_clients_that_come_again(scene: Scene) -> None:
    """One connection after the other leaves as many replies unread as it may, and the next one does the same."""
    for _ in range(12):
        unread(scene.impostor(queue=8), 60_000, 350)


@attack(*BOTH)
def small_replies_left_unread(scene: Scene) -> None:
    """Thousands of calls with small replies that are read only in the end: all are there, in order."""
    one = scene.impostor(queue=100_000)
    count, heard = 4000, 0
    for call_id in range(count):
        one.send(request(call_id=call_id))
        while one.channel == "doorbell" and call_id - heard > 3000:  # only this test reads its ring
            assert one.hear() == Reply(heard, None, ())
            heard += 1
    for call_id in range(heard, count):
        assert one.hear() == Reply(call_id, None, ())
    one.assert_served()


@attack(*BOTH)
def calls_without_end(scene: Scene) -> None:
    """Several clients keep the server busy with proper calls, and read all of the replies."""
    clients = [scene.impostor() for _ in range(3)]
    data = encode(request("x" * 100))

    def burst() -> None:
        for one in clients:
            for _ in range(30):
                one.send(data)
        for one in clients:
            for _ in range(30):
                assert isinstance(one.hear(), Reply)

    scene.while_others_call(burst)


@attack(*BOTH)
def failures_without_end(scene: Scene) -> None:
    """Calls that fail in the handler and log lines at the server: they raise typed errors, and no client must wait."""
    one = scene.impostor()
    for _ in range(300):
        assert isinstance(one.ask(request("not a tensor", method="double")), Failure)


@attack(*BOTH)
def messages_to_a_server_that_is_busy(scene: Scene) -> None:
    """While a handler is busy, clients and strangers send as much as the channels take."""
    one = scene.impostor()
    one.send(request(0.5, method="sleep"))
    noise, wires = os.urandom(60_000), [scene.wire(queue=8) for _ in range(8)]
    answer, until = None, time.monotonic() + ANSWER_S
    while answer is None and time.monotonic() < until:
        for wire in wires:
            try_to_send(wire, noise)
        answer = one.hear(0.0)
    assert answer == Reply(0, None, ())
    for wire in wires:
        answer = wire.hear()
        assert isinstance(answer, (Refused, Goodbye))
