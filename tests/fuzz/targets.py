"""Everything that takes bytes or values from a peer without a socket; each target says what a valid outcome is.

A target's input is one string of bytes, from which all that it does follows, so that an input that breaks the rule can
be put in again. Where a peer would name something that exists for this run only (its segment, a bell), the input has a
stand-in of fixed form.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from msgspec.msgpack import Ext

from shmtransport.bell import Bell, bell_file
from shmtransport.connection import Connection, segment_layout
from shmtransport.descriptor import MAX_DIMENSIONS, TensorDescriptor
from shmtransport.dtypes import BY_NAME, TABLE
from shmtransport.errors import (
    ArenaFull,
    ConnectRefused,
    LocalProtocolError,
    MessageTooLarge,
    PeerDied,
    PeerProtocolError,
    RemoteError,
    TensorTooLarge,
)
from shmtransport.handshake import Admission, Admitted, Limits, ServerReplaced, Sizes, Wishes, client_handshake
from shmtransport.layout import HEADER, PAGE_BYTES, RELEASE_CELL_BYTES, Layout
from shmtransport.liveness import holder
from shmtransport.message import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_DEPTH,
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    MIN_MESSAGE_BYTES,
    PREAMBLE,
    AnyMessage,
    Attach,
    Failure,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refused,
    Reply,
    Request,
    Welcome,
    decode,
    encode,
    pack,
    unpack,
)
from shmtransport.message_ring import MessageRing, message_ring_bytes
from shmtransport.protocol import Call, PendingReply
from shmtransport.segment import Segment, is_segment_name
from shmtransport.statistics import Counters

from ..transport.arenas import Pair, raw
from ..transport.messages import MESSAGES
from ..transport.protocols import Direction, Link
from . import mutations
from .rule import Target

_MOST_MESSAGE_BYTES = DEFAULT_MAX_MESSAGE_BYTES

with warnings.catch_warnings():  # torch says once that complex32 is experimental
    warnings.simplefilter("ignore")
    torch.empty(0, dtype=torch.complex32)


def _descriptor(sequence: int, dtype: str = "float32") -> TensorDescriptor:
    return TensorDescriptor(64 * sequence, (2, 3), dtype, sequence, sequence)


def _with_tensors(value: Any) -> Any:
    """A packed value; its tensors get the indices from 0 on."""
    indices = iter(range(MAX_TENSORS))
    return pack(value, lambda _tensor: next(indices))


_RICH = [torch.ones(1), (1, 2.5, "text", b"bytes"), {"k": [None, {7: True}]}, np.ones(1)]
_REQUESTS = (
    Request(0, "linear", [1, "a", None], {"layer": 3}, (_descriptor(1),)),
    Request(1, "m", _with_tensors(_RICH), {"keyword": (1, [2])}, (_descriptor(1), _descriptor(2))),
    Request(2, "m", _with_tensors([torch.ones(1)] * 4), {}, tuple(_descriptor(1 + n) for n in range(4))),
)
_REPLIES = (
    Reply(0, _with_tensors(torch.ones(1)), (_descriptor(1),)),
    Reply(1, _with_tensors(_RICH), (_descriptor(1), _descriptor(2))),
    Reply(2, _with_tensors((torch.ones(1), np.ones(1))), (_descriptor(3), _descriptor(4))),
    Reply(0, None, ()),
    Reply(9, None, (_descriptor(4),)),
    Failure(1, "handler", "ValueError", "no such layer: é"),
    Failure(2, "ArenaFull", "ArenaFull", "requested 1 MiB"),
)
_ENCODED = tuple(encode(message) for message in (*MESSAGES, *_REQUESTS, *_REPLIES))
_REFUSALS = tuple(map(encode, (Refused("too many clients"), Refused(""), Refused("é"), Refused("x" * 4096))))
_ENCODED_REQUESTS = (*map(encode, _REQUESTS), *map(encode, _REQUESTS), encode(Goodbye("done")))
_ENCODED_REPLIES = (*map(encode, _REPLIES), encode(Goodbye("done")))

# --- valid outcomes ---------------------------------------------------------------------------------------------------


def _check_count(*numbers: int) -> None:
    for number in numbers:
        assert type(number) is int, f"a count is a {type(number).__name__}"
        assert 0 <= number < 2**63, f"a count is {number}"


def _check_text(limit: int, *texts: str) -> None:
    for text in texts:
        assert type(text) is str, f"a text is a {type(text).__name__}"
        assert len(text) <= limit, f"a text has {len(text)} characters; the limit is {limit}"


def _check_descriptors(descriptors: Sequence[TensorDescriptor]) -> None:
    assert type(descriptors) is tuple
    assert len(descriptors) <= MAX_TENSORS, f"{len(descriptors)} descriptors"
    for descriptor in descriptors:
        assert type(descriptor) is TensorDescriptor
        _check_count(descriptor.offset, *descriptor.shape, descriptor.slot, descriptor.sequence)
        assert len(descriptor.shape) <= MAX_DIMENSIONS, f"{len(descriptor.shape)} dimensions"
        _check_text(_MOST_MESSAGE_BYTES, descriptor.dtype)


def _check_message(message: AnyMessage) -> None:
    """Every field has the type and the limits that ``message`` promises."""
    match message:
        case Hello(request, reply, most, channel):
            _check_count(request, reply, most)
            assert channel in ("zmq", "doorbell")
        case Refused(reason) | Goodbye(reason):
            _check_text(4096, reason)
        case Offer(most):
            _check_count(most)
        case Attach(segment, bell) | Welcome(segment, bell):
            _check_text(MAX_NAME_CHARACTERS, segment, bell)
        case Request(call_id, method, arguments, keywords, tensors):
            _check_count(call_id)
            _check_text(MAX_NAME_CHARACTERS, method)
            assert (type(arguments), type(keywords)) == (list, dict)
            _check_text(_MOST_MESSAGE_BYTES, *keywords)
            _check_descriptors(tensors)
        case Reply(call_id, _, tensors):
            _check_count(call_id)
            _check_descriptors(tensors)
        case Failure(call_id, kind, type_name, text):
            _check_count(call_id)
            _check_text(MAX_NAME_CHARACTERS, kind, type_name)
            _check_text(4096, text)
        case _:
            raise AssertionError(f"a {type(message).__name__} is no message")


_PLAIN = (type(None), bool, int, float, str, bytes)


def _check_value(value: Any, depth: int = 0) -> None:
    """A value is one that ``pack`` takes, and an array in it is read-only."""
    kind = type(value)
    if kind in _PLAIN or kind is torch.Tensor:
        return
    if kind is np.ndarray:
        assert not value.flags.writeable, "an array can be written"
        return
    assert depth <= MAX_DEPTH, f"a value is nested more than {MAX_DEPTH} deep"
    if kind is dict:
        assert all(type(key) in (str, int) for key in value), "a key is neither str nor int"
        value = value.values()
    else:
        assert kind in (list, tuple), f"a value is a {kind.__name__}"
    for item in value:
        _check_value(item, depth + 1)


def _check_extensions(value: Any, tensors: int) -> None:
    """What was unpacked without complaint has no extensions but those that name a tensor, and marks of tuples."""
    if type(value) is Ext:
        assert value.code in (1, 2), f"an extension of code {value.code} was taken for a tensor"
        assert len(value.data) == 2, f"{len(value.data)} bytes were taken for an index"
        assert int.from_bytes(value.data, "little") < tensors, "a tensor that is not there was found"
    elif type(value) is list:
        marked = bool(value) and type(value[0]) is Ext and value[0].code == 3
        for item in value[marked:]:
            _check_extensions(item, tensors)
    elif type(value) is dict:
        for item in value.values():
            _check_extensions(item, tensors)


# --- messages and values ----------------------------------------------------------------------------------------------


class Decoding(Target):
    """``message.decode``."""

    name = "decode"

    def generate(self, random: Random) -> bytes:
        kind = random.random()
        if kind < 0.65:
            return mutations.mutate(random, _ENCODED)
        if kind < 0.7:  # of another version, of which a refusal alone can be read
            data = mutations.mutate(random, (*_ENCODED, *_REFUSALS))
            return data[:1] + bytes((random.randrange(256),)) + data[2:]
        if kind < 0.98:
            return mutations.message(random)
        return random.choice((b"", PREAMBLE)) + random.randbytes(random.randrange(60))

    def check(self, data: bytes) -> None:
        _check_message(decode(data))


class Unpacking(Target):
    """``message.unpack`` of the result in a reply that carries one tensor of each dtype."""

    name = "unpack"

    def __init__(self) -> None:
        self._tensors = [torch.empty((2,), dtype=row.torch) for row in TABLE]
        values = (_RICH, [torch.ones(1)] * len(TABLE), [np.ones(1)] * len(TABLE), {"a": ((1,), [2])}, [[[0]]], None)
        self._valid = tuple(msgspec.msgpack.encode(_with_tensors(value)) for value in values)

    def generate(self, random: Random) -> bytes:
        if random.random() < 0.4:
            return mutations.mutate(random, self._valid)
        return mutations.value(random, len(TABLE) + (random.random() < 0.1))

    def check(self, data: bytes) -> None:
        message = decode(PREAMBLE + b"\x94\x07\x00" + data + b"\x90")
        assert isinstance(message, Reply)
        _check_value(unpack(message.result, self._tensors))
        _check_extensions(message.result, len(self._tensors))


# --- descriptors and headers ------------------------------------------------------------------------------------------


class _Described(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A descriptor, and the sizes that it is validated against."""

    data_bytes: int
    release_slots: int
    descriptor: TensorDescriptor


class Validating(Target):
    """``TensorDescriptor.validate``: what it lets pass lies within the data area, is aligned, and can be released."""

    name = "validate"

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(_Described)

    def generate(self, random: Random) -> bytes:
        data_bytes, slots = random.choice(((PAGE_BYTES, 16), (PAGE_BYTES, 1), (1 << 20, 4096), (1 << 40, 4096)))
        descriptor = mutations.descriptor(random, data_bytes, slots)
        return mutations.array_of([*map(msgspec.msgpack.encode, (data_bytes, slots)), descriptor])

    def check(self, data: bytes) -> None:
        try:
            given = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # no message could have it
            raise PeerProtocolError from error
        descriptor = given.descriptor
        row, nbytes = descriptor.validate(given.data_bytes, given.release_slots)
        _check_descriptors((descriptor,))
        assert row.name == descriptor.dtype
        assert nbytes == math.prod(descriptor.shape) * row.itemsize, f"it has {nbytes} bytes"
        if nbytes == 0:
            assert descriptor.sequence == 0, "nothing is there to be released"
            return
        assert 0 <= descriptor.offset <= given.data_bytes - nbytes, "it lies beyond the data area"
        assert descriptor.offset % row.itemsize == 0, "it is not aligned"
        assert 0 <= descriptor.slot < given.release_slots, "there is no such slot"
        assert descriptor.sequence >= 1, "it can't be released"


_SIZE_BYTES = 8


class HeaderReading(Target):
    """``Layout.from_header``: the areas follow each other within the segment, whose size is the input's end."""

    name = "header"

    def generate(self, random: Random) -> bytes:
        layout = Layout(
            *random.choice(((PAGE_BYTES,), (8 * PAGE_BYTES, 16), (1, 1, 700), (0, 0, 0), (1 << 40, 4096, 9)))
        )
        header, segment_bytes = layout.header(), layout.total_bytes
        kind = random.random()
        if kind < 0.7:
            header = mutations.damaged_header(random, header)
        elif kind < 0.9:
            header = mutations.mutate(random, (header,))
        if random.random() < 0.5:
            segment_bytes = random.choice(mutations.BOUNDARIES) % 2**63
        return header + segment_bytes.to_bytes(_SIZE_BYTES, "little")

    def check(self, data: bytes) -> None:
        header, segment_bytes = data[:-_SIZE_BYTES], int.from_bytes(data[-_SIZE_BYTES:], "little")
        layout = Layout.from_header(header, segment_bytes)
        assert layout.header() == header
        ends = (
            PAGE_BYTES,
            layout.message_ring_offset + layout.message_ring_bytes,
            layout.release_offset + layout.release_slots * RELEASE_CELL_BYTES,
            layout.data_offset + layout.data_bytes,
        )
        starts = (layout.message_ring_offset, layout.release_offset, layout.data_offset, segment_bytes)
        assert all(end <= start for end, start in zip(ends, starts, strict=True)), f"areas overlap: {ends}, {starts}"


class Borrowing(Target):
    """``ReceiveArena.borrow``: a view shows the bytes that its descriptor names, and is released once, by name.

    The input is a list of descriptors; all borrows are held until the last.
    """

    name = "borrow"
    data_bytes: ClassVar[int] = PAGE_BYTES
    slots: ClassVar[int] = 16

    def __init__(self) -> None:
        self._pair = Pair(self.data_bytes, self.slots)
        self._content = Random(0).randbytes(self.data_bytes)
        start = self._pair.owner.layout.data_offset
        self._pair.owner.view[start : start + self.data_bytes] = self._content
        self._decoder = msgspec.msgpack.Decoder(list[TensorDescriptor])
        self._before = [0] * self.slots
        self._due: list[TensorDescriptor] = []

    def generate(self, random: Random) -> bytes:
        descriptors = [mutations.descriptor(random, self.data_bytes, self.slots) for _ in range(random.randrange(1, 5))]
        if random.random() < 0.3:
            descriptors.append(random.choice(descriptors))
        return mutations.array_of(descriptors)

    def check(self, data: bytes) -> None:
        try:
            descriptors = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # no message could have it
            raise PeerProtocolError from error
        self._before = list(self._pair.cells)
        self._due = []
        held = []
        for descriptor in descriptors:
            held.append(self._pair.receive.borrow(descriptor))
            if held[-1].nbytes:
                self._due.append(descriptor)
            self._look_at(held[-1], descriptor)
            assert len(self._pair.receive) == len(self._due), "borrows were miscounted"
            assert list(self._pair.cells) == self._before, "a borrow was released before its end"

    def _look_at(self, tensor: torch.Tensor, descriptor: TensorDescriptor) -> None:
        row = BY_NAME[descriptor.dtype]
        assert (tensor.shape, tensor.dtype) == (descriptor.shape, row.torch), "shape or dtype is another"
        end = descriptor.offset + tensor.nbytes
        assert not tensor.nbytes or raw(tensor) == self._content[descriptor.offset : end], "it shows other bytes"

    def leftovers(self) -> str:
        if len(self._pair.receive):
            return f"{len(self._pair.receive)} borrows stay held"
        cells = list(self._pair.cells)
        for slot in range(self.slots):
            due = [descriptor.sequence for descriptor in self._due if descriptor.slot == slot]
            if cells[slot] not in (due or [self._before[slot]]):
                return f"release cell {slot} has {cells[slot]}; {due or 'nothing'} was borrowed by it"
        return ""

    def close(self) -> None:
        self._pair.close()


# --- protocols --------------------------------------------------------------------------------------------------------


class _Exchange(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a peer sends, one message after the other; ``snapshot`` is the client's option."""

    snapshot: bool
    messages: list[bytes]


_exchanges = msgspec.msgpack.Decoder(_Exchange)
_SENT = ("float32", "bfloat16", "bool", "int64")


def _send_tensors(direction: Direction) -> weakref.WeakSet[torch.Tensor]:
    """Send tensors of the sequences 1, 2, … ; the set will be of the views that their receiver holds."""
    views: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    borrow = direction.borrow

    def watched(descriptor: TensorDescriptor) -> torch.Tensor:
        view = borrow(descriptor)
        views.add(view)
        return view

    for name in _SENT:
        direction.export(torch.zeros(2, dtype=BY_NAME[name].torch))
    direction.borrow = watched  # type: ignore[method-assign]
    return views


class _Protocol(Target):
    """One half of the protocol, over dicts in place of arenas; the input is what the other half sends."""

    valid: ClassVar[Sequence[bytes]]
    tags: ClassVar[Sequence[int]]

    def __init__(self) -> None:
        self._views: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def generate(self, random: Random) -> bytes:
        messages = []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            kind = random.random()
            if kind < 0.1:
                messages.append(random.choice(self.valid))
            elif kind < 0.5:
                messages.append(mutations.mutate(random, self.valid))
            else:
                messages.append(
                    mutations.message(random, self.tags if random.random() < 0.95 else range(9), len(_SENT))
                )
        return msgspec.msgpack.encode(_Exchange(random.random() < 0.3, messages))

    def carrying(self, message: bytes) -> bytes:
        return msgspec.msgpack.encode(_Exchange(False, [message]))

    def leftovers(self) -> str:
        for generation in (1, 2):
            if self._views:  # an error that a call keeps has a traceback, whose frames have the call and its tensors
                gc.collect(generation)
        return f"{len(self._views)} borrows stay held" if self._views else ""


class ClientReceiving(_Protocol):
    """``ClientProtocol.receive`` with three calls in flight: each ends at most once, with a value or with an error.

    ``PeerDied`` is the other outcome: the server said goodbye.
    """

    name = "client"
    refusals = (PeerProtocolError, PeerDied)
    valid = _ENCODED_REPLIES
    tags = (5, 7, 7, 7, 8)

    def check(self, data: bytes) -> None:
        exchange = _exchanges.decode(data)
        link = Link(snapshot=exchange.snapshot)
        calls = [link.request()[0] for _ in range(3)]
        self._views = _send_tensors(link.down)
        ended: set[int] = set()
        for message in exchange.messages:
            try:
                call = link.client.receive(message)
            except PeerProtocolError:
                ended |= {call.call_id for call in calls if call.done}
                assert len(link.client) == len(calls) - len(ended), "calls in flight were miscounted"
                raise
            if call is not None:
                assert call.call_id not in ended, "a call ended twice"
                ended.add(call.call_id)
                self._look_at(call)
            assert [call.call_id for call in calls if call.done] == sorted(ended), "another call ended"
            assert len(link.client) == len(calls) - len(ended), "calls in flight were miscounted"
            assert not (exchange.snapshot and self._views), "a snapshot keeps its tensor borrowed"

    def _look_at(self, call: PendingReply) -> None:
        assert call.done
        with contextlib.suppress(RemoteError, ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError):
            _check_value(call.result())


class ServerReceiving(_Protocol):
    """``ServerProtocol.receive``: a call of plain values and tensors, or None for a goodbye."""

    name = "server"
    valid = _ENCODED_REQUESTS
    tags = (5, 6, 6, 6, 6)

    def check(self, data: bytes) -> None:
        link = Link()
        self._views = _send_tensors(link.up)
        for message in _exchanges.decode(data).messages:
            call = link.server.receive(message)
            if call is not None:
                self._look_at(call)

    def _look_at(self, call: Call) -> None:
        _check_count(call.call_id)
        _check_text(MAX_NAME_CHARACTERS, call.method)
        assert (type(call.arguments), type(call.keywords)) == (list, dict)
        _check_text(_MOST_MESSAGE_BYTES, *call.keywords)
        for value in (*call.arguments, *call.keywords.values()):
            _check_value(value, 2)


# --- handshakes -------------------------------------------------------------------------------------------------------

_SEGMENT, _OWN_SEGMENT = "/shmtransport-" + "0" * 32, "/shmtransport-" + "1" * 32
_BELL, _OWN_BELL = "/shmtransport-bell-0-" + "0" * 32, "/shmtransport-bell-0-" + "1" * 32
_NO_SEGMENT, _NO_BELL = "/shmtransport-" + "2" * 32, "/shmtransport-bell-0-" + "2" * 32  # nothing has these names
_SEGMENTS = (*[_SEGMENT] * 9, _OWN_SEGMENT)
_MESSAGE_BYTES = 4096
_SIZES = Sizes(PAGE_BYTES, 2 * PAGE_BYTES)
_SAME_SIZES = Sizes(PAGE_BYTES, PAGE_BYTES)  # one side's segment could be taken for the other's


class _Visit(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A peer's half of one handshake, or of several at once, and the segment that it has made.

    ``header`` takes the place of the segment's own header unless it is empty, ``segment_bytes`` that of its size unless
    it is negative, and ``bell_bytes`` likewise that of the size of its bell's file. A message goes with the number of
    the client that sends it. ``channel`` and ``sizes`` are what a client on this side wishes for.
    """

    arena_bytes: int
    ring_message_bytes: int
    header: bytes
    segment_bytes: int
    bell_bytes: int
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
        """What there is now and was not at the last ``begin``; other processes come and go meanwhile."""
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
    if name.startswith("sem.shmtransport-bell-"):
        return name.startswith(f"sem.shmtransport-bell-{os.getpid()}-")
    if is_segment_name(f"/{name}"):
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


@contextlib.contextmanager
def _hostile_bell(visit: _Visit) -> Iterator[str]:
    """The name of the peer's bell."""
    with Bell.create() as bell:
        if visit.bell_bytes >= 0:
            os.truncate(bell_file(bell.name), visit.bell_bytes)
        yield bell.name


def _damage(random: Random, visit: _Visit, valid: Sequence[bytes]) -> None:
    """Do one or two things to a handshake that would have come about."""
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
        messages.insert(at, (sender, random.choice((*valid, *_ENCODED))))
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
    elif kind > 0.9:
        visit.bell_bytes = random.choice((0, 0, 1, 31, 33, 1 << 20, 1 << 40))
    if 0.7 < kind < 0.9:
        visit.segment_bytes = random.choice((0, 1, HEADER.size, PAGE_BYTES, *mutations.BOUNDARIES)) % 2**63


def _check_connection(connection: Connection, own_bytes: int, peer_bytes: int) -> None:
    """A connection's arenas are as large as was agreed, and can be used, and so can the peer's bell."""
    own, peer = (segment_layout(size).data_bytes for size in (own_bytes, peer_bytes))
    assert connection.send_arena.empty((own,), torch.uint8).nbytes == own
    sent = TensorDescriptor(0, (peer,), "uint8", 0, 1)
    assert not connection.receive_arena.borrow(sent).sum()
    if connection.bells is not None:
        connection.bells.peer.ring()


def _check_no_names(segment: str, bell: str) -> None:
    """What both sides have opened has no name any more, so that a killed process leaves nothing."""
    assert not os.path.exists(f"/dev/shm{segment}"), "a segment that both sides have mapped has a name"
    assert not (bell and os.path.exists(bell_file(bell))), "a client's bell that both sides have opened has a name"


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
            encode(Welcome(_SEGMENT, _BELL)),
            encode(Welcome(_OWN_SEGMENT, _OWN_BELL)),
            encode(Welcome(_NO_SEGMENT)),
            encode(Welcome(_SEGMENT, _NO_BELL)),
            encode(Refused("too many clients")),
        )

    def generate(self, random: Random) -> bytes:
        channel = random.choice(("zmq", "doorbell"))
        offered = random.choice((MIN_MESSAGE_BYTES, _MESSAGE_BYTES, _MESSAGE_BYTES))
        ring_message_bytes, bell = (offered, _BELL) if channel == "doorbell" else (0, "")
        sizes = random.choice((_SIZES, _SAME_SIZES))
        welcome = Welcome(random.choice(_SEGMENTS), bell)
        messages = [(0, encode(Offer(offered))), (0, encode(welcome))]
        visit = _Visit(sizes.reply_arena_bytes, ring_message_bytes, b"", -1, -1, channel, sizes, messages)
        _damage(random, visit, self._valid)
        return msgspec.msgpack.encode(visit)

    def check(self, data: bytes) -> None:
        visit = _visits.decode(data)
        self._shared_memory.begin()
        wishes = Wishes(visit.sizes, _MESSAGE_BYTES, "doorbell" if visit.channel == "doorbell" else "zmq")
        with contextlib.closing(_hostile_segment(visit)) as segment, _hostile_bell(visit) as bell:
            names = {_SEGMENT: segment.name, _BELL: bell}
            handshake = client_handshake(wishes, Counters())
            try:
                _check_message(decode(next(handshake)))
                for _, answer in visit.messages:
                    sent = decode(handshake.send(_substitute(answer, names)))
                    assert isinstance(sent, Attach), f"the client sent a {type(sent).__name__}"
                    names |= {_OWN_SEGMENT: sent.segment, _OWN_BELL: sent.bell}
            except StopIteration as end:
                end.value.check_owner(os.getpid())
                assert not os.path.exists(f"/dev/shm{segment.name}"), (
                    "the server passed the client's segment off as its own"
                )
                self._end(end.value, visit.sizes, names)
            finally:
                handshake.close()

    def _end(self, connection: Connection, sizes: Sizes, names: dict[str, str]) -> None:
        _check_connection(connection, *sizes)
        _check_no_names(names[_OWN_SEGMENT], names[_OWN_BELL])
        own_bell = None if connection.bells is None else connection.bells.own
        connection.close()
        if own_bell is not None:
            own_bell.close()

    def leftovers(self) -> str:
        return self._shared_memory.left()


class ClientAdmission(Target):
    """``Admission.receive``: what is granted is within the limits, and no client's handshake harms another's.

    ``Refused`` and ``Goodbye`` are answers that a client may get, too.
    """

    name = "admission"
    limits: ClassVar[Limits] = Limits(
        max_arena_bytes=sum(_SIZES),
        max_total_arena_bytes=2 * sum(_SIZES),
        max_clients=3,
        max_message_bytes=_MESSAGE_BYTES,
    )

    def __init__(self) -> None:
        self._bell = Bell.create()
        self._shared_memory = _SharedMemory()
        self._admission = self._new_admission()
        self._valid = (
            encode(Hello(*_SIZES, _MESSAGE_BYTES)),
            encode(Hello(*_SIZES, MIN_MESSAGE_BYTES, "doorbell")),
            encode(Hello(*_SIZES, 1 << 20, "doorbell")),
            encode(Hello(0, 0, _MESSAGE_BYTES)),
            encode(Attach(_SEGMENT)),
            encode(Attach(_SEGMENT, _BELL)),
            encode(Attach(_SEGMENT, _OWN_BELL)),
            encode(Attach(_OWN_SEGMENT)),
            encode(Attach(_NO_SEGMENT)),
            encode(Attach(_SEGMENT, _NO_BELL)),
            encode(Goodbye("")),
        )

    def _new_admission(self) -> Admission:
        return Admission(self.limits, Counters(), lambda: self._bell)

    def generate(self, random: Random) -> bytes:
        channel = random.choice(("zmq", "doorbell"))
        asked = random.choice((MIN_MESSAGE_BYTES, _MESSAGE_BYTES, _MESSAGE_BYTES, 1 << 20))
        ring_message_bytes, bell = (min(asked, _MESSAGE_BYTES), _BELL) if channel == "doorbell" else (0, "")
        sizes = random.choice((_SIZES, _SAME_SIZES))
        hello, attach = encode(Hello(*sizes, asked, channel)), encode(Attach(_SEGMENT, bell))
        messages = [(0, hello), (0, attach)]
        if random.random() < 0.5:
            other = encode(Attach(random.choice(_SEGMENTS), bell))
            messages = [(0, hello), (1, hello), (0, attach), (1, other)]
        visit = _Visit(sizes.request_arena_bytes, ring_message_bytes, b"", -1, -1, channel, sizes, messages)
        _damage(random, visit, self._valid)
        return msgspec.msgpack.encode(visit)

    def check(self, data: bytes) -> None:
        visit = _visits.decode(data)
        if not os.path.exists(bell_file(self._bell.name)):  # an earlier input's doing, and found out then
            self._bell.close()
            self._bell = Bell.create()
        self._shared_memory.begin()
        self._admission = self._new_admission()
        with contextlib.closing(_hostile_segment(visit)) as segment, _hostile_bell(visit) as bell:
            names = {_SEGMENT: segment.name, _BELL: bell, _OWN_BELL: self._bell.name}
            self._admit(visit.messages, names)

    def _admit(self, messages: list[tuple[int, bytes]], names: dict[str, str]) -> None:
        connections: dict[bytes, Connection] = {}
        waiting: set[bytes] = set()
        try:
            for number, message in messages:
                identity = str(number).encode()
                if identity in connections:
                    continue  # the server asks its connection, not this
                waiting.discard(identity)
                answer, admitted = self._admission.receive(identity, _substitute(message, names), os.getpid())
                if isinstance(answer, Offer):
                    waiting.add(identity)
                    self._look_at_offer(decode(_substitute(message, names)), answer)
                if admitted is None:
                    assert answer is None or isinstance(answer, (Offer, Refused, Goodbye)), f"the answer is {answer}"
                else:
                    connections[identity] = admitted.connection
                    self._look_at_admitted(admitted, decode(_substitute(message, names)), names)
                    assert isinstance(answer, Welcome)
                    names[_OWN_SEGMENT] = answer.segment
        finally:
            for connection in connections.values():
                connection.close()
            for identity in (*connections, *waiting):
                self._admission.forget(identity)

    def _look_at_admitted(self, admitted: Admitted, attach: Message, names: dict[str, str]) -> None:
        _check_connection(admitted.connection, admitted.sizes.reply_arena_bytes, admitted.sizes.request_arena_bytes)
        assert isinstance(attach, Attach)
        assert attach.segment != names.get(_OWN_SEGMENT), "a client passed the server's own segment off as its own"
        _check_no_names(attach.segment, "")
        if admitted.connection.bells is not None:
            assert os.path.exists(bell_file(attach.bell)), "the server removed a bell that may be another's"

    def _look_at_offer(self, hello: Message, offer: Offer) -> None:
        assert isinstance(hello, Hello)
        asked = hello.request_arena_bytes + hello.reply_arena_bytes
        assert asked <= self.limits.max_arena_bytes, f"arenas of {asked} bytes were granted"
        assert MIN_MESSAGE_BYTES <= offer.max_message_bytes <= min(hello.max_message_bytes, _MESSAGE_BYTES)

    def leftovers(self) -> str:
        if not os.path.exists(bell_file(self._bell.name)):
            return "the server's bell has lost its name, so that no other client can open it"
        for identity in (b"first", b"second"):  # together they fill the server
            answer, _ = self._admission.receive(identity, self._valid[0])
            if not isinstance(answer, Offer):
                return f"the server's room is not free again: {answer}"
        return self._shared_memory.left()

    def close(self) -> None:
        self._bell.close()


# --- message ring -----------------------------------------------------------------------------------------------------


class _Step(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The peer writes its cells and, at ``at``, the length of a record; then this side writes ``send`` bytes."""

    at: int
    length: int
    published: int
    consumed: int
    ended: int
    send: int


_steps = msgspec.msgpack.Decoder(list[_Step])


class RingReading(Target):
    """``MessageRing``: whatever the peer has in its cells and records, a message is no longer than its ring."""

    name = "message ring"
    message_bytes: ClassVar[int] = 256
    area: ClassVar[int] = 256  # where the records begin, after four cells of 64 bytes

    def __init__(self) -> None:
        layout = Layout(PAGE_BYTES, 1, message_ring_bytes(self.message_bytes))
        self._own, self._peer = Segment.create(layout), Segment.create(layout)
        start, end = layout.message_ring_offset, layout.message_ring_offset + layout.message_ring_bytes
        self._rings = [segment.view[start:end] for segment in (self._own, self._peer)]
        self._empty = bytes(end - start)
        self._capacity = end - start - self.area

    def generate(self, random: Random) -> bytes:
        steps = []
        position = sent = taken = 0
        for _ in range(random.randrange(1, 8)):
            length = random.choice((0, 1, 5, 100, self.message_bytes, random.randrange(self.message_bytes)))
            at, step = position, -(-(4 + length) // 8) * 8
            position += step
            damaged = random.random() < 0.35
            claimed = random.choice((length, step - 3, self._capacity, random.choice(mutations.BOUNDARIES) % 2**32))
            published = random.choice(
                (position + 8, position - 1, at + self._capacity + 8, random.choice(mutations.BOUNDARIES))
            )
            if random.random() < 0.5:
                taken = sent
            consumed = random.choice((sent + 8, sent + 2**32, taken - 8, random.choice(mutations.BOUNDARIES)))
            send = random.choice((0, 1, 100, self.message_bytes, self.message_bytes))
            sent += -(-(4 + send) // 8) * 8
            steps.append(
                _Step(
                    at,
                    claimed if damaged and random.random() < 0.5 else length,
                    published % 2**64 if damaged and random.random() < 0.5 else position,
                    consumed % 2**64 if random.random() < 0.2 else taken,
                    int(random.random() < 0.1),
                    send,
                )
            )
        return msgspec.msgpack.encode(steps)

    def check(self, data: bytes) -> None:
        for ring in self._rings:
            ring[:] = self._empty
        hostile = self._rings[1]
        ring = MessageRing(self._own, self._peer)
        taken = 0
        for step in _steps.decode(data):
            at = self.area + step.at % self._capacity // 8 * 8
            hostile[at : at + 4] = step.length.to_bytes(4, "little")
            for cell, number in ((0, step.published), (1, step.consumed), (3, step.ended)):
                hostile[64 * cell : 64 * cell + 8] = number.to_bytes(8, "little")
            read = 0
            while (message := ring.read()) is not None:
                assert ring.largest_message >= 0
                assert len(message) <= self._capacity, f"a message has {len(message)} bytes"
                read += 1
                assert read <= self._capacity // 8, "more messages were read than the ring can hold"
            assert not ring.readable()
            assert ring.ended() == bool(step.ended)
            ring.write(b"x" * step.send)
            published = int.from_bytes(self._rings[0][:8], "little")
            taken = max(taken, step.consumed) if step.consumed <= published else taken
            assert published - taken <= self._capacity, "a message that the peer has not read was overwritten"

    def close(self) -> None:
        self._rings.clear()
        self._own.close()
        self._peer.close()


TARGETS: tuple[Callable[[], Target], ...] = (
    Decoding,
    Unpacking,
    Validating,
    HeaderReading,
    Borrowing,
    ClientReceiving,
    ServerReceiving,
    ClientHandshake,
    ClientAdmission,
    RingReading,
)
