"""The protocol without I/O: what can't be encoded or may not be sent is an error, and nothing stays held."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from shmtransport.errors import (
    ArenaFull,
    LocalProtocolError,
    MessageTooLarge,
    PeerDied,
    PeerProtocolError,
    TransportError,
)
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.in_flight import CallInFlight
from shmtransport.protocol.messages import (
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
from tests.support.protocols import ProtocolPair

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
    pair = ProtocolPair()
    with pytest.raises(kind):
        pair.request(torch.ones(2), {"nested": torch.ones(3)}, bad)
    assert not pair.up.held
    assert len(pair.client) == 0
    assert pair.client_counters.tensor_bytes_sent == pair.client_counters.control_bytes_sent == 0
    pending, call = pair.submit("next")
    pair.client.take_reply(pair.server.encode_reply(call.call_id, "works"))
    assert pending.take_result() == "works"


def test_a_full_arena_half_way_withdraws_the_first_half() -> None:
    """If the third tensor finds no room, the first two are given back."""
    pair = ProtocolPair()
    pair.up.room = 2
    with pytest.raises(ArenaFull):
        pair.request(torch.ones(1), torch.ones(1), torch.ones(1))
    assert not pair.up.held
    assert len(pair.client) == 0


def test_a_reply_that_can_not_be_encoded_holds_nothing() -> None:
    """The same on the server's side; its failure then reaches the caller."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    with pytest.raises(LocalProtocolError, match="type set") as caught:
        pair.server.encode_reply(call.call_id, [torch.ones(2), {1, 2}])
    assert not pair.down.held
    pair.client.take_reply(pair.server.encode_failure(call.call_id, caught.value))
    with pytest.raises(LocalProtocolError, match="on the server: an object of type set"):
        pending.take_result()


def test_the_most_tensors_of_one_message_arrive() -> None:
    """MAX_TENSORS tensors are allowed; one more names the limit."""
    pair = ProtocolPair()
    _, call = pair.submit([torch.tensor(number) for number in range(MAX_TENSORS)])
    assert [tensor.item() for tensor in call.arguments[0]] == list(range(MAX_TENSORS))
    with pytest.raises(LocalProtocolError, match=f"{MAX_TENSORS} tensors at most"):
        pair.request([torch.ones(1)] * (MAX_TENSORS + 1))


def test_an_overlong_method_name_is_the_callers_error() -> None:
    """What the receiver's limits refuse must be refused at home."""
    pair = ProtocolPair()
    with pytest.raises(LocalProtocolError):
        pair.client.begin_call(CallInFlight("m" * 300), (), {})


def test_a_request_that_could_not_be_sent_is_taken_back() -> None:
    """It holds no tensors and is not in flight any longer; a reply to it completes nothing; others are untouched."""
    pair = ProtocolPair()
    other, other_call = pair.submit(torch.ones(1))
    pending, _ = pair.request(torch.ones(2), [torch.ones(3)])
    assert (len(pair.client), len(pair.up.held)) == (2, 3)
    pair.client.take_back(pending)
    assert (len(pair.client), len(pair.up.held)) == (1, 1)
    assert pair.client.take_reply(pair.server.encode_reply(pending.call_id, "unasked")) is None
    assert not pending.ended
    pair.client.take_reply(pair.server.encode_reply(other_call.call_id, "done"))
    assert other.take_result() == "done"


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
    pair = ProtocolPair()
    pending, _ = pair.submit()
    with pytest.raises(PeerProtocolError, match=f"the server sent a {type(message).__name__}"):
        pair.client.take_reply(encode(message))
    assert not pending.ended


@pytest.mark.parametrize(
    "message", [*_HANDSHAKE, Reply(0, None, ()), Failure(0, "", "", "")], ids=lambda message: type(message).__name__
)
def test_a_server_takes_requests_only(message: Message) -> None:
    """Any other message from the client is its error, named."""
    with pytest.raises(PeerProtocolError, match=f"the client sent a {type(message).__name__}"):
        ProtocolPair().server.take_request(encode(message))


def test_goodbye_ends_a_connection_on_either_side() -> None:
    """To the server it is the end of the client; to the client it is the server's death, with its reason."""
    pair = ProtocolPair()
    assert pair.server.take_request(encode(Goodbye("done"))) is None
    with pytest.raises(PeerDied, match="ended the connection: shut down"):
        pair.client.take_reply(encode(Goodbye("shut down")))


def test_garbage_is_the_peers_error_on_either_side() -> None:
    """Bytes that don't decode raise PeerProtocolError and complete nothing."""
    pair = ProtocolPair()
    pending, _ = pair.submit()
    for receive in (pair.client.take_reply, pair.server.take_request):
        with pytest.raises(PeerProtocolError):
            receive(b"garbage")
    assert not pending.ended


_INVALID = TensorDescriptor(0, (1,), "float32", 0, 99)


def test_a_reply_with_an_invalid_descriptor_fails_its_call() -> None:
    """The call ends with the peer's error, and ``receive`` raises it too, to end the connection."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    with pytest.raises(PeerProtocolError, match="sequence 99"):
        pair.client.take_reply(encode(Reply(call.call_id, None, (_INVALID,))))
    assert pending.ended
    with pytest.raises(PeerProtocolError, match="sequence 99"):
        pending.take_result()


def test_an_invalid_descriptor_is_the_peers_error_wherever_it_comes() -> None:
    """In a request, and in a late reply that is only to be thrown away."""
    pair = ProtocolPair()
    with pytest.raises(PeerProtocolError):
        pair.server.take_request(encode(Request(0, "m", [], {}, (_INVALID,))))
    with pytest.raises(PeerProtocolError):
        pair.client.take_reply(encode(Reply(12345, None, (_INVALID,))))


def test_a_request_whose_values_are_invalid_holds_nothing() -> None:
    """Tensors that came with values that don't unpack are released."""
    pair = ProtocolPair()
    descriptor = pair.up.export(torch.ones(1))
    bad = encode(Request(0, "m", [msgspec.msgpack.Ext(9, b"")], {}, (descriptor,)))
    with pytest.raises(PeerProtocolError, match="names no tensor"):
        pair.server.take_request(bad)
    assert not pair.up.held
