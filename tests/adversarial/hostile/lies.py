"""What servers do to clients against the protocol, by the step of the connection in which they do it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec.msgpack import Ext

from shmtransport.core.layout import DEFAULT_RELEASE_SLOTS, FORMAT_VERSION
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.errors import ConnectRefused, ConnectTimeout, PeerDied, PeerProtocolError
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.dtypes import BY_NAME
from shmtransport.memory.receive_arena import release_cells
from shmtransport.memory.segment import SEGMENTS, Segment
from shmtransport.protocol.messages import (
    MAGIC_BYTE,
    PREAMBLE,
    AnyRequest,
    Attach,
    Cancel,
    Goodbye,
    Hello,
    Message,
    More,
    Offer,
    OneWayRequest,
    Refused,
    Reply,
    Request,
    StreamRequest,
    Welcome,
    encode,
)
from shmtransport.protocol.values import MAX_DEPTH
from tests.support.rings import CONSUMED, ENDED, PUBLISHED

from .attacks import NOWHERE, said, with_each_field_wrong
from .servers import Guest, Lie

ARENA_BYTES = 64 * 1024
HUGE = (1 << 63) - 1
TENSOR = Ext(1, b"\0\0")
NOISE = (b"", b"\0", PREAMBLE, b"HTTP/1.1 200 OK\r\n\r\n", PREAMBLE + b"\xc1" * 50, b"\xff" * 3000, bytes((0xD5, 9)))


# --- the handshake ----------------------------------------------------------------------------------------------------


def offers() -> Iterator[tuple[str, Any, tuple[type[Exception], ...]]]:
    """Name, answer to Hello, and the errors that the client may raise."""
    protocol = (PeerProtocolError,)
    for size in (0, 1, 1023, 65537, 1 << 62, HUGE):
        yield f"messages of {size} bytes", Offer(size), protocol
    for index, data in enumerate(with_each_field_wrong([2, 65536])):
        yield f"wrong type {index}", data, protocol
    for index, data in enumerate(NOISE):
        yield f"noise {index}", data, protocol
    for message in (Welcome(NOWHERE), Attach(NOWHERE), Hello(1, 1, 1), Reply(0, 1, ())):
        yield f"a {type(message).__name__}", message, (PeerProtocolError, PeerDied)
    yield "a Goodbye", Goodbye("no"), (ConnectRefused,)
    yield "no", Refused("no\x1b[2J" * 500), (ConnectRefused,)
    yield "another version", bytes((MAGIC_BYTE, FORMAT_VERSION + 1)) + encode(Offer(65536))[2:], protocol
    yield "cut short", encode(Offer(65536))[:-1], protocol
    yield "too long", bytes(65537), (ConnectTimeout,)
    yield "nothing", None, (ConnectTimeout,)


_made: list[str] = []


def made(make: Callable[[str], object]) -> str:
    """Make something that is no segment; return its name, which looks like one's."""
    name = f"/shmtransport-{os.urandom(16).hex()}"
    _made.append(SEGMENTS.file(name))
    make(SEGMENTS.file(name))
    return name


def remove_made() -> None:
    """Remove the false segments that servers have made."""
    while _made:
        path = Path(_made.pop())
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _other_size(guest: Guest, arena_bytes: int) -> Welcome:
    layout = segment_layout(arena_bytes, guest.hello.max_message_bytes if guest.by_doorbell else 0)
    guest.segment.close()
    guest.segment = Segment.create(layout)
    return guest.welcome()


def _changed_header(guest: Guest, attach: Attach) -> Welcome:
    guest.segment.view[20] ^= 1
    return guest.welcome()


def _cut_off(guest: Guest, attach: Attach) -> Welcome:
    os.truncate(guest.segment.fd, 4096)
    return guest.welcome()


WELCOMES: dict[str, Callable[[Guest, Attach], Message | bytes | None]] = {
    "a segment that is not there": lambda guest, _: Welcome(NOWHERE),
    "no segment": lambda guest, _: Welcome(""),
    "a file of the system": lambda guest, _: Welcome("/etc/passwd"),
    "a path upwards": lambda guest, _: Welcome("/../../etc/passwd"),
    "the client's own segment": lambda guest, attach: Welcome(attach.segment),
    "an empty file": lambda guest, _: Welcome(made(lambda path: Path(path).touch())),
    "a file of noise": lambda guest, _: Welcome(
        made(lambda path: Path(path).write_bytes(os.urandom(guest.layout.total_bytes)))
    ),
    "a segment that nobody holds": lambda guest, _: Welcome(
        made(lambda path: Path(path).write_bytes(guest.layout.header().ljust(guest.layout.total_bytes, b"\0"))),
    ),
    "a directory": lambda guest, _: Welcome(made(os.mkdir)),
    "a pipe": lambda guest, _: Welcome(made(os.mkfifo)),
    "a larger segment": lambda guest, _: _other_size(guest, 2 * ARENA_BYTES),
    "a smaller segment": lambda guest, _: _other_size(guest, 4096),
    "a header that lies": _changed_header,
    "a segment cut off": _cut_off,
    "an offer once more": lambda _guest, _attach: Offer(65536),
    "a goodbye": lambda _guest, _attach: Goodbye("no"),
    "a reply": lambda _guest, _attach: Reply(0, 1, ()),
    "noise": lambda _guest, _attach: PREAMBLE + b"\xc1",
    "wrong types": lambda _guest, _attach: said([4, 1, 2]),
    "too many fields": lambda guest, _: said([4, guest.segment.name, "", 0]),
    "the first half": lambda guest, _: encode(guest.welcome())[:20],
    "nothing": lambda _guest, _attach: None,
}
# --- replies ----------------------------------------------------------------------------------------------------------


def replied(request: Request, result: Any = None, *descriptors: Any) -> bytes:
    """A reply with these descriptors, valid or not."""
    return said([7, request.call_id, result, list(descriptors)])


def forged(
    request: Request, offset: Any = 0, shape: Any = (8,), dtype: Any = "uint8", slot: Any = 0, sequence: Any = 1
) -> bytes:
    return replied(request, TENSOR, [offset, shape, dtype, slot, sequence])


def nested(request: Request, level: bytes, depth: int) -> bytes:
    head = PREAMBLE + bytes((0x94, 7, request.call_id))
    return head + level * depth + b"\xc0" + b"\x90"


def wrong_replies(request: Request) -> dict[str, list[bytes]]:
    """Answers to one call, any one of which ends the connection with PeerProtocolError."""
    good = forged(request)
    end = ARENA_BYTES
    wide = [name for name, row in BY_NAME.items() if row.itemsize > 1]
    return {
        "cut short": [good[:length] for length in range(len(good))],
        "with more behind it": [good + b"\0", good + good],
        "noise": list(NOISE),
        "of another version": [bytes((MAGIC_BYTE, version)) + good[2:] for version in (0, FORMAT_VERSION + 1, 255)],
        "of another kind": [
            encode(message)
            for message in (
                Hello(1, 1, 1),
                Refused("no"),
                Offer(65536),
                Attach(NOWHERE),
                Welcome(NOWHERE),
                Request(0, "echo", [], {}, ()),
            )
        ]
        + [said([tag, request.call_id, 1, []]) for tag in (9, 255, -1, "7")],
        "of wrong types": [
            *(said([7, value, 1, []]) for value in (None, True, -1, 1 << 63, 1.5, "x", b"x", [], {})),
            *(said([7, request.call_id, 1, value]) for value in (None, True, 1, "x", {}, [[]], [None])),
            *(said([8, request.call_id, *texts]) for texts in ([1, "x", "x"], ["x", None, "x"], ["x", "x", b"x"])),
            *(said([7, request.call_id, *rest]) for rest in ([], [1], [1, [], 0])),
            said([8, request.call_id, "x" * 257, "x", "x"]),
            said([8, request.call_id, "x", "x", "x" * 4097]),
        ],
        "with a wrong descriptor": [
            *(forged(request, offset=value) for value in (-1, end, end - 7, 1 << 62, HUGE, 1 << 63, 0.5, "0", None)),
            *(forged(request, shape=value) for value in ([end + 1], [HUGE] * 16, [1 << 32, 1 << 32], [1] * 17)),
            *(forged(request, shape=value) for value in ([-1], [1 << 63], 8, None, "8", [[8]], [3, 0, HUGE])),
            *(forged(request, dtype=value) for value in ("", "object", "UINT8", 1, None, "x" * 5000)),
            *(forged(request, offset=1, shape=[1], dtype=name) for name in wide),
            *(forged(request, slot=value) for value in (-1, DEFAULT_RELEASE_SLOTS, HUGE, 1 << 64 - 1, "0")),
            *(forged(request, sequence=value) for value in (0, -1, 1 << 63, None)),
            forged(request, shape=[0], sequence=1),
        ],
        "with one tensor twice": [
            replied(request, [TENSOR, Ext(1, b"\1\0")], [0, [8], "uint8", 0, 1], [64, [8], "uint8", 0, 1])
        ],
        "with extensions that name nothing": [
            replied(request, value, [0, [8], "uint8", 0, 1])
            for value in (
                *(Ext(code, data) for code in (1, 2) for data in (b"", b"\0", b"\1\0", b"\0\0\0", b"\xff\xff")),
                *(Ext(code, b"\0\0") for code in (0, 4, 77, 127, -128)),
                Ext(-1, bytes(4)),
                [1, Ext(3, b"")],
                Ext(3, b""),
                {b"key": 1},
                {1.5: 1},
            )
        ],
        "with an array that numpy can't have": [
            replied(request, Ext(2, b"\0\0"), [0, [4], name, 0, 1]) for name in ("bfloat16", "float8_e5m2")
        ],
        "nested too deep": [
            nested(request, level, depth)
            for level in (b"\x91", b"\x81\xa1x", b"\x92\xc7\x00\x03")
            for depth in (MAX_DEPTH + 2, 1000, 60_000 // len(level))
        ],
    }


WRONG_REPLIES = tuple(wrong_replies(Request(0, "echo", [], {}, ())))


def lie_in_turn(kind: str) -> Callable[[Guest, Request], None]:
    """Answer the first client with the first of these, the second with the second, and so on."""
    turn = iter(range(1_000_000))

    def answer(guest: Guest, request: Request) -> None:
        messages = wrong_replies(request)[kind]
        guest.say(messages[next(turn) % len(messages)])

    return answer


# --- parts of streams -------------------------------------------------------------------------------------------------


def parted(request: AnyRequest, result: Any = None, *descriptors: Any) -> bytes:
    """A part with these descriptors, valid or not."""
    return said([11, request.call_id, result, list(descriptors)])


def wrong_parts(request: StreamRequest) -> dict[str, list[bytes]]:
    """Answers to one stream, any one of which ends the connection with PeerProtocolError."""
    good = parted(request, TENSOR, [0, [8], "uint8", 0, 1])
    end, call_id = ARENA_BYTES, request.call_id
    return {
        "cut short": [good[:length] for length in range(len(good))],
        "with more behind it": [good + b"\0", good + good],
        "of a client's kinds": [
            encode(message)
            for message in (
                StreamRequest(call_id, "count", [], {}, (), 1),
                OneWayRequest(call_id, "count", [], {}, ()),
                More(call_id, 1),
                Cancel(call_id),
            )
        ],
        "of wrong types": [
            *(said([11, value, 1, []]) for value in (None, True, -1, 1 << 63, 1.5, "x", b"x", [], {})),
            *(said([11, call_id, 1, value]) for value in (None, True, 1, "x", {}, [[]], [None])),
            *(said([11, *rest]) for rest in ([], [call_id], [call_id, 1], [call_id, 1, [], 0])),
        ],
        "with a wrong descriptor": [
            parted(request, TENSOR, wrong)
            for wrong in (
                [end, [8], "uint8", 0, 1],
                [0, [end + 1], "uint8", 0, 1],
                [0, [HUGE] * 16, "uint8", 0, 1],
                [0, [8], "object", 0, 1],
                [0, [8], "uint8", DEFAULT_RELEASE_SLOTS, 1],
                [0, [8], "uint8", 0, 0],
            )
        ],
        "that name no tensor": [parted(request, Ext(1, data)) for data in (b"", b"\0\0", b"\1\0", b"\xff\xff")],
    }


WRONG_PARTS = tuple(wrong_parts(StreamRequest(0, "count", [], {}, (), 8)))


def parts_in_turn(kind: str) -> Callable[[Guest, StreamRequest], None]:
    """As ``lie_in_turn``, for streams: a good part comes first."""
    turn = iter(range(1_000_000))

    def answer(guest: Guest, request: StreamRequest) -> None:
        messages = wrong_parts(request)[kind]
        guest.say(parted(request, "good"))
        guest.say(messages[next(turn) % len(messages)])

    return answer


# --- what is written into memory --------------------------------------------------------------------------------------


def _set_cell(cell: int, value: int) -> Callable[[Guest, Request], None]:
    def answer(guest: Guest, request: Request) -> None:
        guest.say(Reply(request.call_id + 1000, None, ()))
        guest.forger.set_cell(cell, (guest.forger.cell(cell) + value) % (1 << 64))
        guest.forger.post()

    return answer


def _set_length(length: int) -> Callable[[Guest, Request], None]:
    def answer(guest: Guest, request: Request) -> None:
        guest.forger.publish(encode(Reply(request.call_id, None, ())), length)

    return answer


def _too_large(guest: Guest, request: Request) -> None:
    data = replied(request, "x" * 70_000)
    guest.forger.set_records((struct.pack("<I", len(data)) + data).ljust(guest.forger.capacity, b"\0"))
    guest.forger.set_cell(PUBLISHED, -(-(4 + len(data)) // 8) * 8)
    guest.forger.post()


def _noise(guest: Guest, _request: Request) -> None:
    guest.segment.view[: guest.layout.data_offset] = os.urandom(guest.layout.data_offset)
    guest.forger.post()


RING_LIES = (
    *(Lie(f"published {value:+}", answer=_set_cell(PUBLISHED, value)) for value in (-8, 1, 4, 1 << 20, 1 << 63)),
    *(Lie(f"a record of {length} bytes", answer=_set_length(length)) for length in (100, 65536, 1 << 31, 2**32 - 1)),
    Lie("a reply that is too large", answer=_too_large),
    Lie("noise all over", answer=_noise),
    Lie("the end", (PeerDied,), answer=lambda guest, _: guest.forger.set_cell(ENDED, 1)),
)


def read_too_much(guest: Guest) -> None:
    """Claim to have read what was never written."""
    guest.forger.set_cell(CONSUMED, 1 << 40)


def forge_releases(guest: Guest) -> None:
    """Overwrite the release table with noise and with likely numbers."""
    start = guest.layout.release_offset
    guest.segment.view[start : start + guest.layout.release_bytes] = os.urandom(guest.layout.release_bytes)
    cells = release_cells(guest.segment)
    for slot in range(64):
        cells[slot] = int.from_bytes(os.urandom(1), "little")


# --- replies that are allowed, though no good server sends them -------------------------------------------------------


def echoed(guest: Guest, request: Request) -> bytes:
    """The proper reply to a call of echo with one uint8 tensor: its bytes, copied to the start of the reply arena."""
    sent: TensorDescriptor = request.tensors[0]
    start = guest.theirs.layout.data_offset + sent.offset
    nbytes = sent.shape[0]
    into = guest.layout.data_offset
    guest.segment.view[into : into + nbytes] = guest.theirs.view[start : start + nbytes]
    return replied(request, TENSOR, [0, [nbytes], "uint8", request.call_id % 64, request.call_id + 1])
