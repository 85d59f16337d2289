"""The protocol without I/O: what can't be encoded or may not be sent is an error, and nothing stays held."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from shmtransport.descriptor import TensorDescriptor
from shmtransport.errors import (
    ArenaFull,
    LocalProtocolError,
    MessageTooLarge,
    PeerDied,
    PeerProtocolError,
    TransportError,
)
from shmtransport.message import (
    MAX_TENSORS,
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
    encode,
)
from shmtransport.protocol import PendingReply

from .protocols import Link, never_wait

# --- encoding that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (object(), LocalProtocolError),
        (2**70, LocalProtocolError),
        ("x" * 70_000, MessageTooLarge),
        ("\ud800", LocalProtocolError),
        ([torch.ones(1)] * MAX_TENSORS, LocalProtocolError),
    ],
    ids=["type", "integer", "size", "unicode", "count"],
)
def test_a_request_that_can_not_be_encoded_holds_nothing(bad: Any, kind: type[TransportError]) -> None:
    """The tensors before the bad value are withdrawn, no call is pending, and nothing counts as sent."""
    link = Link()
    with pytest.raises(kind):
        link.request(torch.ones(2), {"nested": torch.ones(3)}, bad)
    assert not link.up.held
    assert len(link.client) == 0
    assert link.client_counters.tensor_bytes_sent == link.client_counters.control_bytes_sent == 0
    pending, call = link.submit("next")
    link.client.receive(link.server.reply(call.call_id, "works"))
    assert pending.result() == "works"


def test_a_full_arena_half_way_withdraws_the_first_half() -> None:
    """If the third tensor finds no room, the first two are given back."""
    link = Link()
    link.up.room = 2
    with pytest.raises(ArenaFull):
        link.request(torch.ones(1), torch.ones(1), torch.ones(1))
    assert not link.up.held
    assert len(link.client) == 0


def test_a_reply_that_can_not_be_encoded_holds_nothing() -> None:
    """The same on the server's side; its failure then reaches the caller."""
    link = Link()
    pending, call = link.submit()
    with pytest.raises(LocalProtocolError, match="type set") as caught:
        link.server.reply(call.call_id, [torch.ones(2), {1, 2}])
    assert not link.down.held
    link.client.receive(link.server.failure(call.call_id, caught.value))
    with pytest.raises(LocalProtocolError, match="on the server: an object of type set"):
        pending.result()


def test_the_most_tensors_of_one_message_arrive() -> None:
    """MAX_TENSORS tensors are allowed; one more names the limit."""
    link = Link()
    _, call = link.submit([torch.tensor(number) for number in range(MAX_TENSORS)])
    assert [tensor.item() for tensor in call.arguments[0]] == list(range(MAX_TENSORS))
    with pytest.raises(LocalProtocolError, match=f"{MAX_TENSORS} tensors at most"):
        link.request([torch.ones(1)] * (MAX_TENSORS + 1))


def test_an_overlong_method_name_is_the_callers_error() -> None:
    """What the receiver's limits refuse must be refused at home."""
    link = Link()
    with pytest.raises(LocalProtocolError):
        link.client.request(PendingReply("m" * 300, never_wait), (), {})


def test_a_request_that_could_not_be_sent_is_taken_back() -> None:
    """Its tensors are held no more, it is not in flight, and a reply to it completes nothing; others are untouched."""
    link = Link()
    other, other_call = link.submit(torch.ones(1))
    pending, _ = link.request(torch.ones(2), [torch.ones(3)])
    assert (len(link.client), len(link.up.held)) == (2, 3)
    link.client.take_back(pending)
    assert (len(link.client), len(link.up.held)) == (1, 1)
    assert link.client.receive(link.server.reply(pending.call_id, "unasked")) is None
    assert not pending.done
    link.client.receive(link.server.reply(other_call.call_id, "done"))
    assert other.result() == "done"


# --- what a peer may send ---------------------------------------------------------------------------------------------


_HANDSHAKE = [
    Hello(1, 1, 65536),
    Refused("no"),
    Offer(1),
    Attach("x"),
    Welcome("x"),
]


@pytest.mark.parametrize(
    "message", [*_HANDSHAKE, Request(0, "m", [], {}, ())], ids=lambda message: type(message).__name__
)
def test_a_client_takes_replies_only(message: Message) -> None:
    """Any other message from the server is its error, named; pending calls are left for ``fail_all``."""
    link = Link()
    pending, _ = link.submit()
    with pytest.raises(PeerProtocolError, match=f"the server sent a {type(message).__name__}"):
        link.client.receive(encode(message))
    assert not pending.done


@pytest.mark.parametrize(
    "message", [*_HANDSHAKE, Reply(0, None, ()), Failure(0, "", "", "")], ids=lambda message: type(message).__name__
)
def test_a_server_takes_requests_only(message: Message) -> None:
    """Any other message from the client is its error, named."""
    with pytest.raises(PeerProtocolError, match=f"the client sent a {type(message).__name__}"):
        Link().server.receive(encode(message))


def test_goodbye_ends_a_connection_on_either_side() -> None:
    """To the server it is the end of the client; to the client it is the server's death, with its reason."""
    link = Link()
    assert link.server.receive(encode(Goodbye("done"))) is None
    with pytest.raises(PeerDied, match="ended the connection: shut down"):
        link.client.receive(encode(Goodbye("shut down")))


def test_garbage_is_the_peers_error_on_either_side() -> None:
    """Bytes that don't decode raise PeerProtocolError and complete nothing."""
    link = Link()
    pending, _ = link.submit()
    for receive in (link.client.receive, link.server.receive):
        with pytest.raises(PeerProtocolError):
            receive(b"garbage")
    assert not pending.done


_INVALID = TensorDescriptor(0, (1,), "float32", 0, 99)


def test_a_reply_with_an_invalid_descriptor_fails_its_call() -> None:
    """The call ends with the peer's error, and ``receive`` raises it too, to end the connection."""
    link = Link()
    pending, call = link.submit()
    with pytest.raises(PeerProtocolError, match="sequence 99"):
        link.client.receive(encode(Reply(call.call_id, None, (_INVALID,))))
    assert pending.done
    with pytest.raises(PeerProtocolError, match="sequence 99"):
        pending.result()


def test_an_invalid_descriptor_is_the_peers_error_wherever_it_comes() -> None:
    """In a request, and in a late reply that is only to be thrown away."""
    link = Link()
    with pytest.raises(PeerProtocolError):
        link.server.receive(encode(Request(0, "m", [], {}, (_INVALID,))))
    with pytest.raises(PeerProtocolError):
        link.client.receive(encode(Reply(12345, None, (_INVALID,))))


def test_a_request_whose_values_are_invalid_holds_nothing() -> None:
    """Tensors that came with values that don't unpack are released."""
    link = Link()
    descriptor = link.up.export(torch.ones(1))
    bad = encode(Request(0, "m", [msgspec.msgpack.Ext(9, b"")], {}, (descriptor,)))
    with pytest.raises(PeerProtocolError, match="names no tensor"):
        link.server.receive(bad)
    assert not link.up.held
