"""Servers that lie to a real client: in the handshake, or in answer to its calls; and the table of their lies."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq

from shmtransport.core import MessageRing
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.errors import PeerProtocolError
from shmtransport.memory.segment import Segment
from shmtransport.protocol.messages import (
    AnyRequest,
    Attach,
    Goodbye,
    Hello,
    Message,
    Offer,
    OneWayRequest,
    Request,
    StreamRequest,
    Welcome,
    decode,
)
from tests.support.rings import SLEEPS, Forger, record_bytes

from .peers import as_bytes

POLL_MS = 20
_REQUESTS = (Request, OneWayRequest, StreamRequest)


class Guest:
    """One client of a lying server, after the handshake.

    ``segment`` is the server's own, ``theirs`` the client's; with the doorbell channel ``ring`` is the server's end of
    the message ring, ``forger`` writes into it without any rule.
    """

    def __init__(self, router: zmq.Socket[bytes], identity: bytes, hello: Hello) -> None:
        self._router = router
        self._identity = identity
        self.hello = hello
        self.by_doorbell = hello.channel == "doorbell"
        ring_bytes = hello.max_message_bytes if self.by_doorbell else 0
        self.layout = segment_layout(hello.reply_arena_bytes, ring_bytes)
        self.segment = Segment.create(self.layout)
        self._undo = contextlib.ExitStack()
        self._undo.callback(lambda: self.segment.close())  # by then it may be another one

    def attach(self, attach: Attach) -> None:
        """Map what the client has made."""
        ring_bytes = self.hello.max_message_bytes if self.by_doorbell else 0
        self.theirs = Segment.attach(attach.segment, segment_layout(self.hello.request_arena_bytes, ring_bytes))
        self._undo.callback(self.theirs.close)
        if self.by_doorbell:
            self.ring = MessageRing(self.segment.message_ring, self.theirs.message_ring)
            self.forger = Forger(self.segment, 2 * record_bytes(self.hello.max_message_bytes))

    def welcome(self) -> Welcome:
        return Welcome(self.segment.name)

    def say_by_zmq(self, *frames: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it has left already
            self._router.send_multipart([self._identity, *frames])

    def say(self, message: Message | bytes) -> None:
        """Send one message by the agreed channel."""
        data = as_bytes(message)
        if self.by_doorbell:
            self.ring.write(data)
        else:
            self.say_by_zmq(data)

    def say_silently(self, message: bytes) -> None:
        """Send one message through the ring, and don't post the client, as if it did not sleep."""
        Forger(self.theirs, self.forger.capacity).set_cell(SLEEPS, 0)
        self.ring.write(message)

    def close(self) -> None:
        self._undo.close()


Answer = Callable[[Guest, Any], None]
"""What is done with a request of any kind."""
OfferTo = Callable[[Hello], "Message | bytes | None"]
WelcomeTo = Callable[[Guest, Attach], "Message | bytes | None"]


def _proper_offer(hello: Hello) -> Message:
    return Offer(hello.max_message_bytes)


def _proper_welcome(guest: Guest, _attach: Attach) -> Message:
    return guest.welcome()


@dataclass(frozen=True)
class Lie:
    """How a server breaks the rules, and the errors that the client may raise for it.

    ``offer``, ``welcome`` and ``answer`` are steps of the connection; those that are not given are taken properly, but
    for ``answer``, which then is silence. ``meanwhile`` runs again and again while a client is connected.
    """

    name: str
    errors: tuple[type[Exception], ...] = (PeerProtocolError,)
    offer: OfferTo = _proper_offer
    welcome: WelcomeTo = _proper_welcome
    answer: Answer = lambda _guest, _request: None
    meanwhile: Callable[[Guest], None] = field(default=lambda _guest: None)

    def __str__(self) -> str:
        return self.name


class LyingServer:
    """A bare ROUTER in a thread, which tells every client the same lie."""

    def __init__(self, address: str, lie: Lie) -> None:
        self._address = address
        self._lie = lie
        self._guests: dict[bytes, Guest] = {}
        self._over = threading.Event()
        self._bound = threading.Event()
        self.trouble: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> LyingServer:
        self._thread.start()
        assert self._bound.wait(20.0)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()
        assert self.trouble is None, repr(self.trouble)

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        router.router_mandatory = True
        router.sndtimeo = 1000  # a client that reads nothing more is not waited for
        try:
            router.bind(self._address)
            self._bound.set()
            while not self._over.is_set():
                self._step(router)
        except BaseException as error:  # noqa: BLE001 - for the test to see
            self.trouble = error
        finally:
            for guest in self._guests.values():
                guest.close()
            router.close()
            context.term()

    def _step(self, router: zmq.Socket[bytes]) -> None:
        """Handle what has come by ZeroMQ and by rings, or lie to the clients that wait."""
        busy = any(guest.by_doorbell for guest in self._guests.values())
        while router.poll(1 if busy else POLL_MS):
            identity, data = router.recv_multipart()
            self._hear(router, identity, decode(data))
        for guest in list(self._guests.values()):
            if hasattr(guest, "theirs"):
                for request in self._by_ring(guest):
                    self._lie.answer(guest, request)
                self._lie.meanwhile(guest)

    def _hear(self, router: zmq.Socket[bytes], identity: bytes, message: Message) -> None:
        guest = self._guests.get(identity)
        if isinstance(message, Goodbye):
            if guest is not None:
                self._guests.pop(identity).close()
        elif isinstance(message, Hello):
            answer = self._lie.offer(message)
            self._guests[identity] = Guest(router, identity, message)
            if answer is not None:
                self._guests[identity].say_by_zmq(as_bytes(answer))
        elif guest is not None and isinstance(message, Attach):
            welcome = self._lie.welcome(guest, message)
            if self._lie.welcome is _proper_welcome:
                guest.attach(message)
            if welcome is not None:
                guest.say_by_zmq(as_bytes(welcome))
        elif guest is not None and isinstance(message, _REQUESTS):
            self._lie.answer(guest, message)

    @staticmethod
    def _by_ring(guest: Guest) -> Iterator[AnyRequest]:
        """The calls that have come by the ring."""
        if guest.by_doorbell:
            with contextlib.suppress(PeerProtocolError):
                while (data := guest.ring.read()) is not None:
                    message = decode(data)
                    if isinstance(message, _REQUESTS):
                        yield message
