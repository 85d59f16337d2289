"""The two sides of a handshake, with segments and bells that the peer has made."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from random import Random
from typing import ClassVar

import msgspec
import torch

from shmtransport.core import Counters
from shmtransport.core.layout import HEADER, PAGE_BYTES
from shmtransport.endpoints.connection_memory import ConnectionMemory, segment_layout
from shmtransport.endpoints.handshake import (
    Admission,
    Admitted,
    ServerReplaced,
    Sizes,
    client_handshake,
)
from shmtransport.endpoints.options import ClientOptions, ServerOptions
from shmtransport.errors import (
    ConnectRefused,
    PeerProtocolError,
)
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.owner_lock import holder
from shmtransport.memory.segment import SEGMENTS, Segment
from shmtransport.protocol.messages import (
    MIN_MESSAGE_BYTES,
    Attach,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refused,
    Welcome,
    decode,
    encode,
)

from .. import mutations
from ..rule import Target
from .outcomes import check_message
from .samples import ENCODED

_SEGMENT, _OWN_SEGMENT = "/shmtransport-" + "0" * 32, "/shmtransport-" + "1" * 32
_NO_SEGMENT = "/shmtransport-" + "2" * 32  # nothing has this name
_SEGMENTS = (*[_SEGMENT] * 9, _OWN_SEGMENT)
_MESSAGE_BYTES = 4096
_SIZES = Sizes(PAGE_BYTES, 2 * PAGE_BYTES)
_SAME_SIZES = Sizes(PAGE_BYTES, PAGE_BYTES)  # one side's segment could be taken for the other's


class _Visit(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A peer's half of one handshake, or of several at once, and the segment that it has made.

    ``header`` takes the place of the segment's own header unless it is empty, ``segment_bytes`` that of its size unless
    it is negative. A message goes with the number of the client that sends it. ``channel`` and ``sizes`` are what a
    client on this side wishes for.
    """

    arena_bytes: int
    ring_message_bytes: int
    header: bytes
    segment_bytes: int
    channel: str
    sizes: Sizes
    messages: list[tuple[int, bytes]]


_visits = msgspec.msgpack.Decoder(_Visit)


class _SharedMemory:
    """Tells what one input has left in /dev/shm and among the open files."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._files = 0
        self.begin()

    def begin(self) -> None:
        self._known = set(os.listdir("/dev/shm"))
        self._files = len(os.listdir("/proc/self/fd"))

    def left(self) -> str:
        """What has appeared since the last ``begin``, apart from what other processes make and remove."""
        if self._new() and not self._vanish():
            return f"{', '.join(sorted(self._new()))} stays in /dev/shm"
        more = len(os.listdir("/proc/self/fd")) - self._files
        return f"{more} more files are open than before" if more else ""  # fewer: another's was closed

    def _new(self) -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name not in self._known and _is_ours(name)}

    def _vanish(self) -> bool:
        """Whether it was another process's after all, which had not locked it yet."""
        time.sleep(0.05)
        return not self._new()


def _is_ours(name: str) -> bool:
    if SEGMENTS.is_name(f"/{name}"):
        with contextlib.suppress(FileNotFoundError), open(f"/dev/shm/{name}", "rb") as segment:
            return holder(segment.fileno()) is None  # no other process has it
    return False


def _substitute(data: bytes, names: dict[str, str]) -> bytes:
    """Put real names in place of the stand-ins that are still whole."""
    for stand_in, name in names.items():
        data = data.replace(msgspec.msgpack.encode(stand_in), msgspec.msgpack.encode(name))
    return data


def _hostile_segment(visit: _Visit) -> Segment:
    segment = Segment.create(segment_layout(visit.arena_bytes, visit.ring_message_bytes))
    if visit.header:
        segment.view[: HEADER.size] = visit.header[: HEADER.size].ljust(HEADER.size, b"\0")
    if visit.segment_bytes >= 0:
        os.ftruncate(segment.fd, visit.segment_bytes)  # nothing is reserved by that
    return segment


def _damage(random: Random, visit: _Visit, valid: Sequence[bytes]) -> None:
    """Damage a handshake that would have succeeded, in up to two ways; or leave it alone."""
    for _ in range(random.choice((0, 1, 1, 1, 1, 2))):
        if random.random() < 0.75:
            _damage_messages(random, visit.messages, valid)
        else:
            _damage_segment(random, visit)


def _damage_messages(random: Random, messages: list[tuple[int, bytes]], valid: Sequence[bytes]) -> None:
    at = random.randrange(len(messages))
    sender, message = messages[at]
    kind = random.random()
    if kind < 0.65:
        messages[at] = sender, mutations.mutate(random, (message, message, *valid))
    elif kind < 0.8:
        messages.insert(at, (sender, random.choice((*valid, *ENCODED))))
    elif kind < 0.87:
        messages[at] = sender, mutations.message(random)
    elif kind < 0.94:
        messages[at] = 1 - sender, message
    elif len(messages) > 1:
        del messages[at]


def _damage_segment(random: Random, visit: _Visit) -> None:
    kind = random.random()
    if kind < 0.4:
        visit.arena_bytes = random.choice((0, 1, PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES))
        visit.ring_message_bytes = random.choice((0, 1, MIN_MESSAGE_BYTES, _MESSAGE_BYTES))
    elif kind < 0.8:
        header = segment_layout(visit.arena_bytes, visit.ring_message_bytes).header()
        visit.header = mutations.damaged_header(random, header)
    if kind > 0.7:
        visit.segment_bytes = random.choice((0, 1, HEADER.size, PAGE_BYTES, *mutations.BOUNDARIES)) % 2**63


def _check_connection(connection: ConnectionMemory, own_bytes: int, peer_bytes: int) -> None:
    """Check that a connection's arenas have the agreed sizes and can be used, and that the peer can be posted."""
    own, peer = (segment_layout(size).data_bytes for size in (own_bytes, peer_bytes))
    assert connection.send_arena.lend((own,), torch.uint8).nbytes == own
    sent = TensorDescriptor(0, (peer,), "uint8", 0, 1)
    assert not connection.receive_arena.borrow(sent).sum()
    if connection.ring is not None:
        connection.ring.end()


def _check_no_name(segment: str) -> None:
    """Check that a segment both sides have mapped has no name, so that a killed process leaves nothing behind."""
    assert not os.path.exists(f"/dev/shm{segment}"), "a segment that both sides have mapped has a name"


class ClientHandshake(Target):
    """``client_handshake``, answered by a server: a connection of the sizes that were wished for, or nothing is left.

    ``ConnectRefused`` is the other outcome: the server refused. A server may also fall silent.
    """

    name = "client handshake"
    refusals = (PeerProtocolError, ConnectRefused, ServerReplaced)

    def __init__(self) -> None:
        self._shared_memory = _SharedMemory()
        self._valid = (
            encode(Offer(_MESSAGE_BYTES)),
            encode(Offer(MIN_MESSAGE_BYTES)),
            encode(Welcome(_SEGMENT)),
            encode(Welcome(_OWN_SEGMENT)),
            encode(Welcome(_NO_SEGMENT)),
            encode(Refused("too many clients")),
        )

    def generate(self, random: Random) -> bytes:
        channel = random.choice(("zmq", "doorbell"))
        offered = random.choice((MIN_MESSAGE_BYTES, _MESSAGE_BYTES, _MESSAGE_BYTES))
        ring_message_bytes = offered if channel == "doorbell" else 0
        sizes = random.choice((_SIZES, _SAME_SIZES))
        welcome = Welcome(random.choice(_SEGMENTS))
        messages = [(0, encode(Offer(offered))), (0, encode(welcome))]
        visit = _Visit(sizes.reply_arena_bytes, ring_message_bytes, b"", -1, channel, sizes, messages)
        _damage(random, visit, self._valid)
        return msgspec.msgpack.encode(visit)

    def check(self, data: bytes) -> None:
        visit = _visits.decode(data)
        self._shared_memory.begin()
        options = ClientOptions(
            channel="doorbell" if visit.channel == "doorbell" else "zmq",
            arena_bytes=visit.sizes.request_arena_bytes,
            reply_arena_bytes=visit.sizes.reply_arena_bytes,
            max_message_bytes=_MESSAGE_BYTES,
        )
        with contextlib.closing(_hostile_segment(visit)) as segment:
            names = {_SEGMENT: segment.name}
            handshake = client_handshake(options, 0.0, Counters())
            try:
                check_message(decode(next(handshake)))
                for _, answer in visit.messages:
                    sent = decode(handshake.send(_substitute(answer, names)))
                    assert isinstance(sent, Attach), f"the client sent a {type(sent).__name__}"
                    names[_OWN_SEGMENT] = sent.segment
            except StopIteration as end:
                end.value.check_owner(os.getpid())
                assert not os.path.exists(f"/dev/shm{segment.name}"), (
                    "the server passed the client's segment off as its own"
                )
                self._end(end.value, visit.sizes, names)
            finally:
                handshake.close()

    def _end(self, connection: ConnectionMemory, sizes: Sizes, names: dict[str, str]) -> None:
        _check_connection(connection, *sizes)
        _check_no_name(names[_OWN_SEGMENT])
        connection.close()

    def leftovers(self) -> str:
        return self._shared_memory.left()


class ClientAdmission(Target):
    """``Admission.receive``: what is granted is within the limits, and no client's handshake harms another's.

    ``Refused`` and ``Goodbye`` are answers that a client may get, too.
    """

    name = "admission"
    limits: ClassVar[ServerOptions] = ServerOptions(
        max_arena_bytes=sum(_SIZES),
        max_total_arena_bytes=2 * sum(_SIZES),
        max_clients=3,
        max_message_bytes=_MESSAGE_BYTES,
    )

    def __init__(self) -> None:
        self._shared_memory = _SharedMemory()
        self._admission = self._new_admission()
        self._valid = (
            encode(Hello(*_SIZES, _MESSAGE_BYTES)),
            encode(Hello(*_SIZES, MIN_MESSAGE_BYTES, "doorbell")),
            encode(Hello(*_SIZES, 1 << 20, "doorbell")),
            encode(Hello(0, 0, _MESSAGE_BYTES)),
            encode(Attach(_SEGMENT)),
            encode(Attach(_OWN_SEGMENT)),
            encode(Attach(_NO_SEGMENT)),
            encode(Goodbye("")),
        )

    def _new_admission(self) -> Admission:
        return Admission(self.limits, Counters(), lambda: None)

    def generate(self, random: Random) -> bytes:
        channel = random.choice(("zmq", "doorbell"))
        asked = random.choice((MIN_MESSAGE_BYTES, _MESSAGE_BYTES, _MESSAGE_BYTES, 1 << 20))
        ring_message_bytes = min(asked, _MESSAGE_BYTES) if channel == "doorbell" else 0
        sizes = random.choice((_SIZES, _SAME_SIZES))
        hello, attach = encode(Hello(*sizes, asked, channel)), encode(Attach(_SEGMENT))
        messages = [(0, hello), (0, attach)]
        if random.random() < 0.5:
            other = encode(Attach(random.choice(_SEGMENTS)))
            messages = [(0, hello), (1, hello), (0, attach), (1, other)]
        visit = _Visit(sizes.request_arena_bytes, ring_message_bytes, b"", -1, channel, sizes, messages)
        _damage(random, visit, self._valid)
        return msgspec.msgpack.encode(visit)

    def check(self, data: bytes) -> None:
        visit = _visits.decode(data)
        self._shared_memory.begin()
        self._admission = self._new_admission()
        with contextlib.closing(_hostile_segment(visit)) as segment:
            self._admit(visit.messages, {_SEGMENT: segment.name})

    def _admit(self, messages: list[tuple[int, bytes]], names: dict[str, str]) -> None:
        connections: dict[bytes, ConnectionMemory] = {}
        waiting: set[bytes] = set()
        try:
            for number, message in messages:
                identity = str(number).encode()
                if identity in connections:
                    continue  # the server asks its connection, not this
                waiting.discard(identity)
                answer, admitted = self._admission.answer(identity, _substitute(message, names), os.getpid())
                if isinstance(answer, Offer):
                    waiting.add(identity)
                    self._look_at_offer(decode(_substitute(message, names)), answer)
                if admitted is None:
                    assert answer is None or isinstance(answer, (Offer, Refused, Goodbye)), f"the answer is {answer}"
                else:
                    connections[identity] = admitted.memory
                    self._look_at_admitted(admitted, decode(_substitute(message, names)), names)
                    assert isinstance(answer, Welcome)
                    names[_OWN_SEGMENT] = answer.segment
        finally:
            for connection in connections.values():
                connection.close()
            for identity in (*connections, *waiting):
                self._admission.forget(identity)

    def _look_at_admitted(self, admitted: Admitted, attach: Message, names: dict[str, str]) -> None:
        _check_connection(admitted.memory, admitted.sizes.reply_arena_bytes, admitted.sizes.request_arena_bytes)
        assert isinstance(attach, Attach)
        assert attach.segment != names.get(_OWN_SEGMENT), "a client passed the server's own segment off as its own"
        _check_no_name(attach.segment)

    def _look_at_offer(self, hello: Message, offer: Offer) -> None:
        assert isinstance(hello, Hello)
        asked = hello.request_arena_bytes + hello.reply_arena_bytes
        assert asked <= self.limits.max_arena_bytes, f"arenas of {asked} bytes were granted"
        assert MIN_MESSAGE_BYTES <= offer.max_message_bytes <= min(hello.max_message_bytes, _MESSAGE_BYTES)

    def leftovers(self) -> str:
        for identity in (b"first", b"second"):  # together they fill the server
            answer, _ = self._admission.answer(identity, self._valid[0])
            if not isinstance(answer, Offer):
                return f"the server's room is not free again: {answer}"
        return self._shared_memory.left()
