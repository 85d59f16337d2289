"""Clients that attack a server with messages: before the handshake, during it, and after it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from shmtransport.core.layout import FORMAT_VERSION, HEADER, Layout
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.segment import SEGMENTS, Segment
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAGIC_BYTE,
    PREAMBLE,
    Attach,
    ChannelKind,
    Failure,
    Goodbye,
    Hello,
    Offer,
    Refused,
    Reply,
    Welcome,
    encode,
)

from .peers import ARENA_BYTES, Wire, request
from .scene import BOTH, Scene, attack

NOWHERE = "/shmtransport-" + "0" * 32
WRONG_VALUES: tuple[Any, ...] = (None, True, -1, 1 << 63, 1.5, "x", b"x", [], {}, [[]])


def said(fields: list[Any]) -> bytes:
    """A message with these fields, its tag first."""
    return PREAMBLE + msgspec.msgpack.encode(fields)


def hello_for(channel: ChannelKind) -> Hello:
    return Hello(ARENA_BYTES, ARENA_BYTES, DEFAULT_MAX_MESSAGE_BYTES, channel)


def hello_by(scene: Scene) -> Hello:
    return hello_for(scene.channel)


def with_each_field_wrong(fields: list[Any]) -> Iterator[bytes]:
    """A message with one field of a type or size that it can't have, or one field too many."""
    for index in range(1, len(fields)):
        for value in WRONG_VALUES:
            if type(value) is not type(fields[index]):
                yield said([*fields[:index], value, *fields[index + 1 :]])
    yield said([*fields, 0])


# --- before the handshake ---------------------------------------------------------------------------------------------


@attack("zmq")
def noise(scene: Scene) -> None:
    """Bytes that are no message at all: nothing, other protocols, random ones, a preamble alone, wrong magic bytes."""
    wire = scene.wire()
    wire.assert_refused(b"")
    wire.assert_refused(b"GET / HTTP/1.1\r\n\r\n")
    for preamble in (b"\xd5", PREAMBLE, b"\x00\x01", b"\xff" * 5000):
        wire.assert_refused(preamble)
    for length in (1, 2, 3, 50, 5000):
        wire.assert_refused(os.urandom(length))
        wire.assert_refused(PREAMBLE + b"\xc1" + os.urandom(length))


@attack("zmq")
def other_versions(scene: Scene) -> None:
    """A proper Hello of every other format version is refused in words that name both."""
    wire = scene.wire()
    for version in {*range(256)} - {FORMAT_VERSION}:
        data = bytes((MAGIC_BYTE, version)) + encode(hello_by(scene))[2:]
        assert f"version {version}, this side {FORMAT_VERSION}" in wire.assert_refused(data)


@attack("zmq")
def lengths_that_lie(scene: Scene) -> None:
    """Arrays, maps and texts that claim thousands of millions of items, and nesting without end."""
    wire = scene.wire()
    head = PREAMBLE + bytes((0x96, 6, 0)) + b"\xa4echo"
    for start in (PREAMBLE, head, head + b"\x91", head + b"\x90\x80", head + b"\x90\x80\x91\x95\x00"):
        for lie in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"):
            wire.assert_refused(start + lie + b"\xff" * 4)
    for nested in (b"\x91", b"\x81\xa1x", b"\x81"):
        wire.assert_refused(head + nested * (60_000 // len(nested)))


@attack(*BOTH)
def a_hello_cut_short(scene: Scene) -> None:
    """Every beginning of a proper Hello, but for those that are a proper message too."""
    data, wire = encode(hello_by(scene)), scene.wire()
    for length in range(len(data)):
        wire.assert_refused(data[:length])


@attack(*BOTH)
def a_hello_with_a_wrong_bit(scene: Scene) -> None:
    """Each bit of a proper Hello flipped: it is refused, or gets an offer for what it now asks."""
    data, wire = encode(hello_by(scene)), scene.wire()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        answer = wire.ask(bytes(changed))
        assert isinstance(answer, (Refused, Goodbye, Offer)), answer
        if isinstance(answer, Offer):
            wire.send(Goodbye(""))


@attack("zmq")
def a_hello_of_wrong_types(scene: Scene) -> None:
    """Each field of a Hello of every wrong type, and one too many."""
    wire = scene.wire()
    for data in with_each_field_wrong([0, 4096, 4096, 65536, "zmq"]):
        wire.assert_refused(data)
    for channel in ("", "ZMQ", "tcp", "zmq\0", "A\nCRITICAL forged" * 1000):
        assert len(wire.assert_refused(said([0, 4096, 4096, 65536, channel]))) < 400


@attack(*BOTH)
def a_hello_that_wants_all(scene: Scene) -> None:
    """Arenas beyond any limit, messages below the least: refused with figures, and nothing is allocated."""
    wire = scene.wire()
    most = (1 << 63) - 1
    for sizes in ((most, most), (most, 0), (0, most), (1 << 40, 1 << 40)):
        assert "max_arena_bytes" in wire.assert_refused(Hello(*sizes, 65536, scene.channel))
    for least in (0, 1, 1023):
        assert "max_message_bytes" in wire.assert_refused(Hello(4096, 4096, least, scene.channel))


@attack("zmq")
def kinds_that_are_none(scene: Scene) -> None:
    """Every tag that no message has, and tags that aren't numbers."""
    wire = scene.wire()
    for tag in (*range(9, 256), -1, 1 << 64 - 1, "Hello", "A" * 5000, None, 0.0, True, [0]):
        wire.assert_refused(said([tag, 1, 1, 1]))


@attack("zmq")
def words_of_a_server(scene: Scene) -> None:
    """Messages that only a server sends, and those that only a connected client sends."""
    wire = scene.wire()
    for message in (Offer(65536), Welcome(NOWHERE), Refused("no"), Reply(0, 1, ()), Failure(0, "x", "x", "x")):
        wire.assert_refused(message)
    wire.assert_refused(request())
    wire.assert_refused(Attach(NOWHERE))


@attack(*BOTH)
def a_handshake_out_of_order(scene: Scene) -> None:
    """Two Hellos, a Request or a server's message in place of Attach: refused, and the handshake starts over."""
    wire = scene.wire()
    for message in (hello_by(scene), request(), Offer(1), Reply(0, 1, ()), said([3]), b"noise", b""):
        assert isinstance(wire.ask(hello_by(scene)), Offer)
        wire.assert_refused(message)
        wire.assert_refused(Attach(NOWHERE))


# --- the segment that a client names ----------------------------------------------------------------------------------


def attach(scene: Scene, wire: Wire, segment: str) -> None:
    """Say Hello, then name this segment, which the server refuses."""
    assert isinstance(wire.ask(hello_by(scene)), Offer)
    assert NOWHERE[:14] not in wire.assert_refused(said([3, segment]))


def layout_of(scene: Scene, arena_bytes: int = ARENA_BYTES) -> Layout:
    """The layout of a segment that fits ``hello_by``."""
    return segment_layout(arena_bytes, DEFAULT_MAX_MESSAGE_BYTES if scene.channel == "doorbell" else 0)


@contextlib.contextmanager
def file_in_shm(path: str, content: bytes | None = None) -> Iterator[None]:
    """Make a file with this content in /dev/shm; with None, the caller makes it."""
    try:
        if content is not None:
            Path(path).write_bytes(content)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()


@attack(*BOTH)
def segments_that_are_none(scene: Scene) -> None:
    """Names of files, of nothing, and of a form that isn't this package's."""
    wire, name = scene.wire(), NOWHERE[:14]
    others = ("", "/", "/etc/passwd", "/../../etc/passwd", "shmtransport-" + "0" * 32, name, name + "g" * 32)
    for segment in (NOWHERE, *others, NOWHERE + "0", NOWHERE + "\0", NOWHERE + "\n", NOWHERE.upper(), name + "٠" * 32):
        attach(scene, wire, segment)
    for data in with_each_field_wrong([3, NOWHERE]):
        assert isinstance(wire.ask(hello_by(scene)), Offer)
        wire.assert_refused(data)


@attack(*BOTH)
def segments_that_are_files(scene: Scene) -> None:
    """A name of this package's form, but behind it an empty file, noise, a pipe, a directory, a link to somewhere."""
    wire, nbytes = scene.wire(), layout_of(scene).total_bytes
    for make in (
        lambda path: Path(path).write_bytes(b""),
        lambda path: Path(path).write_bytes(b"precious"),
        lambda path: Path(path).write_bytes(os.urandom(nbytes)),
        lambda path: Path(path).write_bytes(layout_of(scene).header().ljust(nbytes, b"\0")),  # no lock is held on it
        lambda path: Path(path).write_bytes(layout_of(scene).header()),
        os.mkfifo,
        os.mkdir,
        lambda path: Path(path).symlink_to("/etc/passwd"),
        lambda path: Path(path).symlink_to(path),
    ):
        name = NOWHERE[:14] + secrets.token_hex(16)
        with file_in_shm(SEGMENTS.file(name)):
            make(SEGMENTS.file(name))
            attach(scene, wire, name)


@attack(*BOTH)
def segments_of_another_size(scene: Scene) -> None:
    """Larger or smaller than agreed, with a message ring where none belongs, or without the one that is needed."""
    wire = scene.wire()
    ring_bytes = layout_of(scene).message_ring_bytes
    for layout in (
        layout_of(scene, ARENA_BYTES - 4096),
        layout_of(scene, ARENA_BYTES + 1),
        Layout(ARENA_BYTES, message_ring_bytes=0 if ring_bytes else 4096),
        Layout(ARENA_BYTES, release_slots=4095, message_ring_bytes=ring_bytes),
        Layout(ARENA_BYTES, release_slots=8192, message_ring_bytes=ring_bytes),
    ):
        segment = Segment.create(layout)
        attach(scene, wire, segment.name)
        segment.close()


@attack(*BOTH)
def headers_that_lie(scene: Scene) -> None:
    """A segment of the right size whose header has any one byte wrong, or was cut off with the file."""
    wire, layout = scene.wire(), layout_of(scene)
    for index in range(0, HEADER.size, 3):
        segment = Segment.create(layout)
        segment.view[index] ^= 0x55
        attach(scene, wire, segment.name)
        segment.close()
    for nbytes in (0, 1, HEADER.size, 4096, layout.total_bytes - 1):
        segment = Segment.create(layout)
        os.truncate(segment.fd, nbytes)
        attach(scene, wire, segment.name)
        segment.close()


@attack("zmq")
def the_servers_own_segment(scene: Scene) -> None:
    """The segment that the server has made for one connection, named as the client's on another.

    The server couldn't notice the end of such a client: the segment's owner is the server, which lives.
    """
    first, second = scene.wire(), scene.wire()
    assert isinstance(first.ask(hello_by(scene)), Offer)
    segment = Segment.create(layout_of(scene))
    welcome = first.ask(Attach(segment.name))
    assert isinstance(welcome, Welcome)
    attach(scene, second, welcome.segment)
    first.send(Goodbye(""))
    segment.close()


@attack(*BOTH)
def anothers_segment(scene: Scene) -> None:
    """A second connection names the first one's segment, which has no name any more; the first goes on."""
    first = scene.impostor()
    attach(scene, scene.wire(), first.segment.name)
    first.assert_served()
