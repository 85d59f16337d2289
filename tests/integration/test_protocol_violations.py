"""Clients that break the rules, before and after the handshake, never disturb another client."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable

import msgspec
import posix_ipc
import pytest
import torch

from shmtransport import Client
from shmtransport.core.layout import FORMAT_VERSION
from shmtransport.endpoints.connection_memory import segment_layout
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.messages import (
    MAGIC_BYTE,
    AnyMessage,
    Attach,
    Goodbye,
    Offer,
    Refused,
    Reply,
    Request,
    Welcome,
    encode,
)
from tests.support.helpers import MIB, Serve, echo, eventually
from tests.support.strangers import HELLO, Intruder, Stranger

SEGMENT = "/shmtransport-" + "0" * 32
WRONG = {
    "nothing": [b""],
    "noise": [b"\x00" * 64, os.urandom(300), b"\xff" * 5000],
    "a magic byte alone": [bytes((MAGIC_BYTE,))],
    "an empty message": [bytes((MAGIC_BYTE, FORMAT_VERSION))],
    "deep nesting": [bytes((MAGIC_BYTE, FORMAT_VERSION)) + b"\x91" * 5000],
    "a length that lies": [bytes((MAGIC_BYTE, FORMAT_VERSION)) + b"\xdd\xff\xff\xff\xff"],
    "a truncated hello": [encode(HELLO)[:-1]],
    "a request first": [encode(Request(0, "echo", [], {}, ()))],
    "attach first": [encode(Attach(SEGMENT))],
    "a server's words": [encode(Offer(1)), encode(Welcome(SEGMENT)), encode(Refused("no")), encode(Reply(0, 1, ()))],
    "hello twice": [encode(HELLO)] * 3,
    "attach to nothing": [encode(HELLO), encode(Attach(SEGMENT))],
    "attach elsewhere": [encode(HELLO), encode(Attach("/../../etc/passwd"))],
    "request after hello": [encode(HELLO), encode(Request(0, "echo", [], {}, ()))],
    "goodbye first": [encode(Goodbye(""))],
    "too long a message": [encode(HELLO), b"\xd5" * 1_000_000],
}


def test_strangers_breaking_the_rules_never_disturb_another_client(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """Every kind of wrong message, again and again, while a client's calls run with all contents checked."""
    serve(double=lambda x: x * 2)
    stop = threading.Event()
    checked = 0

    def work() -> None:
        nonlocal checked
        with Client(address, arena_bytes=MIB) as client:
            while not stop.is_set():
                x = torch.full((1000,), float(checked))
                assert torch.equal(client.call("double", x), x * 2)
                checked += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert eventually(lambda: checked > 0)
        for _ in range(3):
            for messages in WRONG.values():
                one = stranger()
                for message in messages:
                    one.send(message)
            several_parts = stranger()
            several_parts.send(b"one", b"two")
            several_parts.send(b"", b"", b"")
        before = checked
        assert eventually(lambda: checked > before + 20)
        with Client(address, connect_timeout_s=5.0) as late:
            assert late.call("double", torch.ones(2)).tolist() == [2, 2]
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("what", [key for key in WRONG if key not in ("too long a message", "goodbye first")])
def test_a_wrong_message_is_answered_with_a_reason(serve: Serve, stranger: Callable[[], Stranger], what: str) -> None:
    """The sender is told Refused or Goodbye; the reason names no path and no segment."""
    serve(echo=echo)
    one = stranger()
    for message in WRONG[what]:
        one.send(message)
    answers: list[AnyMessage | None] = [one.receive()]
    while not isinstance(answers[-1], (Refused, Goodbye)):
        assert answers[-1] is not None, "no answer"
        answers.append(one.receive())
    reason = answers[-1].reason
    assert reason
    assert "shmtransport-" not in reason
    assert "passwd" not in reason


def tensor(offset: int, shape: tuple[int, ...], dtype: str = "uint8", slot: int = 0, sequence: int = 1) -> bytes:
    ext = msgspec.msgpack.Ext(1, b"\x00\x00")
    return encode(Request(0, "echo", [ext], {}, (TensorDescriptor(offset, shape, dtype, slot, sequence),)))


INTRUSIONS = {
    "beyond the data": tensor(64 * 1024 - 4, (8,)),
    "a shape that overflows": tensor(0, (2**62, 2**62, 2**62)),
    "unknown dtype": tensor(0, (1,), "object"),
    "misaligned": tensor(1, (1,), "float32"),
    "slot out of range": tensor(0, (1,), slot=1 << 40),
    "sequence zero": tensor(0, (1,), sequence=0),
    "an index that names no tensor": encode(Request(0, "echo", [msgspec.msgpack.Ext(1, b"\x05\x00")], {}, ())),
    "an unknown extension": encode(Request(0, "echo", [msgspec.msgpack.Ext(77, b"\x00\x00")], {}, ())),
    "a marker out of place": encode(Request(0, "echo", [1, msgspec.msgpack.Ext(3, b"")], {}, ())),
    "numpy of bfloat16": encode(
        Request(0, "echo", [msgspec.msgpack.Ext(2, b"\0\0")], {}, (TensorDescriptor(0, (1,), "bfloat16", 0, 1),))
    ),
    "a key that is bytes": encode(Request(0, "echo", [{b"key": 1}], {}, ())),
    "depth": bytes((MAGIC_BYTE, FORMAT_VERSION)) + msgspec.msgpack.encode([6, 0, "echo"]) + b"\x91" * 100,
    "hello again": encode(HELLO),
    "attach again": encode(Attach(SEGMENT)),
    "a reply": encode(Reply(0, None, ())),
    "noise": b"\xd5\x01noise",
    "nothing": b"",
}


@pytest.mark.parametrize("what", INTRUSIONS)
def test_a_connected_client_that_breaks_the_rules_loses_its_connection_only(
    serve: Serve, address: str, what: str
) -> None:
    """It gets Goodbye with a reason, is dropped once, and another client goes on."""
    gone: list[int] = []
    server = serve(echo=echo)
    server.on_disconnect(gone.append)
    with Client(address, arena_bytes=64 * 1024) as other:
        other.call("echo", 0)
        intruder = Intruder(address)
        try:
            intruder.send(INTRUSIONS[what])
            answer = intruder.receive()
            assert isinstance(answer, Goodbye)
            assert answer.reason
            assert eventually(lambda: len(gone) == 1)
            intruder.send(encode(Request(1, "echo", [1], {}, ())))
            assert isinstance(intruder.receive(), Goodbye), "it is no client any more"
        finally:
            intruder.close()
        assert other.call("echo", torch.arange(3)).tolist() == [0, 1, 2]
        assert len(gone) == 1


def test_a_segment_that_cant_be_mapped_costs_its_sender_the_connection_only(
    serve: Serve, address: str, stranger: Callable[[], Stranger]
) -> None:
    """A segment whose header claims an absurd size, and which really has it (sparse), can't end the server."""
    serve(echo=echo)
    layout = segment_layout((1 << 50) - 9 * 4096)
    name = "/shmtransport-" + secrets.token_hex(16)
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    try:
        os.ftruncate(memory.fd, layout.total_bytes)
        os.pwrite(memory.fd, layout.header(), 0)
        one = stranger()
        one.send(HELLO)
        assert isinstance(one.receive(), Offer)
        one.send(Attach(name))
        answer = one.receive(2.0)
        with Client(address, connect_timeout_s=2.0) as client:
            assert client.call("echo", 1) == 1
        assert isinstance(answer, Refused)
    finally:
        os.close(memory.fd)
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)


def test_a_segment_that_nobody_holds_is_refused(serve: Serve, address: str, stranger: Callable[[], Stranger]) -> None:
    """A client whose death the kernel couldn't report gets no connection: it might hold its share of memory forever."""
    server = serve({"max_clients": 1}, echo=echo)
    layout = segment_layout(4096)
    name = "/shmtransport-" + secrets.token_hex(16)
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=layout.total_bytes)
    try:
        os.pwrite(memory.fd, layout.header(), 0)
        one = stranger()
        one.send(HELLO)
        assert isinstance(one.receive(), Offer)
        one.send(Attach(name))
        answer = one.receive()
        assert isinstance(answer, Refused)
        assert "lock" in answer.reason
        with Client(address) as client:
            assert client.call("echo", 1) == 1
        assert server.statistics().calls == 1
    finally:
        os.close(memory.fd)
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)
