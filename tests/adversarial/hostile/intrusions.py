"""Connected clients that attack a server with messages, on either channel."""

from __future__ import annotations

import os
import struct
from typing import Any

import msgspec
from msgspec.msgpack import Ext

from shmtransport.core.layout import DEFAULT_RELEASE_SLOTS, FORMAT_VERSION
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.dtypes import BY_NAME
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAGIC_BYTE,
    MAX_TENSORS,
    PREAMBLE,
    Attach,
    Failure,
    Goodbye,
    Hello,
    Offer,
    Refused,
    Reply,
    Request,
    Welcome,
    encode,
)
from shmtransport.protocol.values import MAX_DEPTH

from .attacks import NOWHERE, hello_by, said, with_each_field_wrong
from .peers import ARENA_BYTES, request
from .scene import BOTH, Scene, attack

TENSOR = Ext(1, b"\0\0")
HUGE = (1 << 63) - 1


def descriptor(
    offset: int = 0, shape: tuple[int, ...] = (8,), dtype: str = "uint8", slot: int = 0, sequence: int = 1
) -> TensorDescriptor:
    return TensorDescriptor(offset, shape, dtype, slot, sequence)


def carrying(*descriptors: Any, arguments: list[Any] | None = None) -> bytes:
    """A call of echo with these descriptors, whatever they are."""
    return said([6, 0, "echo", [TENSOR] if arguments is None else arguments, {}, list(descriptors)])


# --- bytes and kinds --------------------------------------------------------------------------------------------------


@attack(*BOTH)
def a_request_cut_short(scene: Scene) -> None:
    """Every proper prefix of a valid Request."""
    data = carrying(descriptor(), arguments=[TENSOR, "x"])
    scene.assert_each_costs_the_connection([data[:length] for length in range(len(data))])


@attack(*BOTH)
def a_request_with_more_behind_it(scene: Scene) -> None:
    """A proper Request, followed by a byte, by another Request, by a whole page."""
    data = encode(request())
    scene.assert_each_costs_the_connection([data + more for more in (b"\0", b"\xc0", data, bytes(4096))])


@attack(*BOTH)
def noise_from_a_client(scene: Scene) -> None:
    """Bytes that are no message, from a connected client; other versions and magic bytes among them."""
    body = encode(request())[2:]
    preambles = [bytes((MAGIC_BYTE, version)) for version in (0, FORMAT_VERSION + 1, 255)] + [b"\0\0", b"\0\1"]
    scene.assert_each_costs_the_connection(
        [b"", b"\0", PREAMBLE, PREAMBLE + os.urandom(64), os.urandom(4000), *(one + body for one in preambles)]
    )


@attack(*BOTH)
def words_out_of_place(scene: Scene) -> None:
    """Every message of the handshake again, including replays of this client's own, and every message of a server."""
    scene.assert_each_costs_the_connection(
        [
            hello_by(scene),
            Hello(1, 1, 1),
            Attach(NOWHERE),
            Attach(NOWHERE),
            Offer(65536),
            Welcome(NOWHERE),
            Refused("no"),
            Reply(0, 1, ()),
            Failure(0, "handler", "X", "x"),
        ]
    )


@attack(*BOTH)
def an_attach_replayed(scene: Scene) -> None:
    """The very bytes with which a client has attached its segment, sent again by it, and by somebody else."""
    one, other = scene.impostor(), scene.wire()
    replay = Attach(one.segment.name)
    assert isinstance(other.ask(hello_by(scene)), Offer)
    other.assert_refused(replay)
    one.assert_served()
    one.send(replay)
    one.assert_dropped()


@attack(*BOTH)
def a_request_of_wrong_types(scene: Scene) -> None:
    """Each field of a Request, and of a descriptor in it, of every wrong type; one too many; kinds that are none."""
    plain = [6, 0, "echo", [TENSOR], {}, [[0, [8], "uint8", 0, 1]]]
    wrong = list(with_each_field_wrong(plain))
    good = plain[5][0]
    wrong += [
        carrying([*good[:index], value, *good[index + 1 :]])
        for index, field in enumerate(good)
        for value in (None, -1, 1 << 63, 1.5, "", b"uint8", {})
        if type(value) is not type(field) or value in (-1, 1 << 63)
    ]
    wrong += [carrying([*good, 0]), carrying(good[:-1]), carrying(None), carrying([])]
    wrong += [said([tag, 0, "echo", [], {}, []]) for tag in (99, 255, -1, "6", None)]
    wrong += [said([6, 0, "m" * 257, [], {}, []])]
    scene.assert_each_costs_the_connection([data for data in wrong if data != said(plain)])


@attack("doorbell")
def too_long_a_message(scene: Scene) -> None:
    """A record of more than the largest message, in a ring that has room for it, full of text that would fill a log.

    By ZeroMQ see ``floods.too_long_a_frame`` and ``test_killed_attackers``.
    """
    for text in ("x" * 5000, "A\nforged", "\x1b[2J" * 300):
        one = scene.impostor(max_message_bytes=1024)
        data = said([0, 1, 1, 1, text.ljust(2000)])
        one.forger.set_records((struct.pack("<I", len(data)) + data)[: one.forger.capacity].ljust(one.forger.capacity))
        one.forger.set_length(0, min(len(data), one.forger.capacity - 4))
        one.forger.set_cell(0, one.forger.capacity)
        one.forger.post()
        one.assert_dropped()


@attack("zmq")
def a_message_in_parts(scene: Scene) -> None:
    """Messages of several frames, from a stranger and from a client; the frames are proper messages."""
    stranger = scene.wire()
    for frames in ([hello_by(scene), hello_by(scene)], [b"", hello_by(scene)], [b"", b"", b""], [b"x"] * 1000):
        stranger.send(*frames)
        assert isinstance(stranger.hear(), (Refused, Goodbye))
    for frames in ([request(), request()], [b"", request()], [b"", b""]):
        one = scene.impostor()
        one.wire.send(*frames)
        one.assert_dropped()


# --- tensors ----------------------------------------------------------------------------------------------------------


@attack(*BOTH)
def descriptors_out_of_range(scene: Scene) -> None:
    """Outside of the data, misaligned, with a product that overflows, of unknown dtypes, slots, sequences."""
    wide = [name for name, row in BY_NAME.items() if row.itemsize > 1]
    end = ARENA_BYTES
    forged = [
        *(descriptor(offset) for offset in (end, end - 7, end + 1, 1 << 32, HUGE, HUGE - 7)),
        *(descriptor(0, shape) for shape in ((end + 1,), (HUGE,), (2, end), (1 << 32, 1 << 32), (HUGE,) * 16)),
        *(descriptor(0, shape) for shape in ((1 << 62, 4), (1 << 63 - 1, 2, 1), (3, 0, HUGE), (0, HUGE, HUGE))),
        *(descriptor(offset, (1,), name, 0, 1) for name in wide for offset in (1, BY_NAME[name].itemsize - 1)),
        *(descriptor(dtype=dtype) for dtype in ("", "object", "float", "O", "UINT8", "torch.uint8", "d" * 60_000)),
        *(descriptor(slot=slot) for slot in (DEFAULT_RELEASE_SLOTS, 1 << 32, HUGE)),
        descriptor(sequence=0),
        descriptor(shape=(0,), sequence=1),
    ]
    scene.assert_each_costs_the_connection([carrying(one) for one in forged] + [carrying([0, [1] * 17, "uint8", 0, 1])])


@attack(*BOTH)
def the_same_slot_twice(scene: Scene) -> None:
    """Two tensors of one message that would be released in the same slot: the same one, and another."""
    seconds = (descriptor(), descriptor(64), descriptor(sequence=2))
    twice = [carrying(descriptor(), second, arguments=[TENSOR, Ext(1, b"\1\0")]) for second in seconds]
    scene.assert_each_costs_the_connection(twice)


@attack(*BOTH)
def tensors_over_each_other(scene: Scene) -> None:
    """Overlapping tensors are each read as they are; it is the attacker's own memory."""
    one = scene.impostor()
    offset = one.layout.data_offset
    one.segment.view[offset : offset + 16] = bytes(range(16))
    sent = carrying(*(descriptor(at, (8,), slot=at, sequence=at + 1) for at in range(8)), arguments=[Ext(1, b"\3\0")])
    for _ in range(3):  # a replay of it as well
        reply = one.ask(sent)
        assert isinstance(reply, Reply)
        at = reply.tensors[0].offset + offset
        assert bytes(one.replies.view[at : at + 8]) == bytes(range(3, 11))


@attack(*BOTH)
def more_tensors_than_there_is_room_for(scene: Scene) -> None:
    """As many tensors as a message takes, each of them the whole arena, echoed: a typed error; one more is too many."""
    one = scene.impostor()
    whole = [descriptor(0, (ARENA_BYTES,), slot=slot, sequence=slot + 1) for slot in range(MAX_TENSORS)]
    answer = one.ask(carrying(*whole, arguments=[[Ext(1, struct.pack("<H", index)) for index in range(MAX_TENSORS)]]))
    assert isinstance(answer, Failure)
    assert answer.error_name == "ArenaFull"
    one.assert_served()
    one.send(carrying(*whole, descriptor(sequence=5000)))
    one.assert_dropped()


@attack(*BOTH)
def extensions_that_name_nothing(scene: Scene) -> None:
    """Indexes of no tensor, unknown codes, markers out of place, numpy dtypes that don't exist, keys of bytes."""
    bad = [
        *(Ext(code, data) for code in (1, 2) for data in (b"", b"\0", b"\1\0", b"\0\0\0", b"\xff\xff")),
        *(Ext(code, b"\0\0") for code in (0, 4, 77, 127, -2, -128)),
        Ext(-1, bytes(4)),  # a timestamp
        Ext(-1, bytes(12)),
        [1, Ext(3, b"")],
        Ext(3, b""),
        [[Ext(3, b""), Ext(3, b"")]],
        {b"key": 1},
        {1.5: 1},
        {True: 1, None: 2},
    ]
    messages = [carrying(descriptor(), arguments=[one]) for one in bad]
    messages.append(carrying(descriptor(dtype="bfloat16", shape=(4,)), arguments=[Ext(2, b"\0\0")]))
    scene.assert_each_costs_the_connection(messages)


@attack(*BOTH)
def nesting(scene: Scene) -> None:
    """Lists, maps and tuples one deeper than allowed, and thousands of times so."""
    head = PREAMBLE + bytes((0x96, 6, 0)) + msgspec.msgpack.encode("echo")
    tail = b"\x80\x90"
    for level in (b"\x91", b"\x81\xa1x", b"\x92\xc7\x00\x03"):
        for depth in (MAX_DEPTH + 1, 1000, 60_000 // len(level)):
            one = scene.impostor()
            one.send(head + level * depth + b"\xc0" + tail)
            one.assert_dropped()


@attack(*BOTH)
def calls_that_ask_for_trouble(scene: Scene) -> None:
    """Unknown methods, arguments that no handler takes, results that are too large: a typed error each time."""
    one = scene.impostor()
    for method in ("", "__init__", "serve", "stop", "__class__", "echo\0", "../echo", "e" * 256):
        answer = one.ask(request(method=method))
        assert isinstance(answer, Failure)
        assert answer.error_name == "LocalProtocolError"
    for arguments in ([], [1, 2, 3], ["x"], [None], [{}]):
        answer = one.ask(request(*arguments, method="double"))
        assert isinstance(answer, Failure)
        assert answer.error_name == "handler"
        assert "watched_server" not in answer.text
    for size in (-1, 1 << 62, 1 << 40, "x", 0.5, None):
        assert isinstance(one.ask(request(size, 1.0, method="fill")), Failure)
    for keyword in ("self", "__class__", "", "value\nforged", "value"):
        answer = one.ask(Request(0, "echo", [1], {keyword: 1}, ()))
        assert isinstance(answer, Failure)
    assert isinstance(one.ask(request("x" * (DEFAULT_MAX_MESSAGE_BYTES - 20))), (Reply, Failure))
    one.assert_served()


@attack(*BOTH)
def nothing_comes_after_a_goodbye(scene: Scene) -> None:
    """A client that sends on after its goodbye: its ring is no longer read; by ZeroMQ it is a stranger."""
    for message in (request(), Goodbye("again"), b"noise"):
        one = scene.impostor()
        one.send(Goodbye("leaving"))
        one.send(message)
        one.assert_dropped(told=False)


@attack(*BOTH)
def calls_by_the_other_channel(scene: Scene) -> None:
    """A client speaks by ZeroMQ and by ring at once, proper calls and then noise: one client, which is dropped once."""
    one = scene.impostor()
    one.wire.send(request(call_id=5))
    assert one.hear() == Reply(5, None, ())
    one.assert_served()
    one.wire.send(b"noise")
    one.assert_dropped()
