"""The messages and calls of streams, one-way calls and cancellations: what they carry, and their limits."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmtransport.errors import CallCancelled, MessageTooLarge, PeerDied, PeerProtocolError, RemoteError
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.calls import Call
from shmtransport.protocol.in_flight import CallInFlight, OneWayCall, StreamInFlight
from shmtransport.protocol.messages import (
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    MAX_WINDOW,
    PREAMBLE,
    Cancel,
    Failure,
    Goodbye,
    Message,
    More,
    OneWayRequest,
    Part,
    Reply,
    Request,
    StreamRequest,
    decode,
    encode,
    is_reply,
)
from tests.support.messages import DESCRIPTOR
from tests.support.protocols import ProtocolPair

# --- messages ---------------------------------------------------------------------------------------------------------

call_ids = st.integers(0, 2**63 - 1)
windows = st.integers(1, MAX_WINDOW)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_NAME_CHARACTERS)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
descriptors = st.lists(
    st.builds(
        TensorDescriptor,
        st.integers(0, 2**63 - 1),
        st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple),
        st.sampled_from(["float32", "uint8", "bfloat16"]),
        st.integers(0, 2**31),
        st.integers(1, 2**63 - 1),
    ),
    max_size=3,
).map(tuple)
calls = (call_ids, texts, st.lists(plain, max_size=3), st.dictionaries(texts, plain, max_size=3), descriptors)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(OneWayRequest, *calls),
    st.builds(StreamRequest, *calls, windows),
    st.builds(Part, call_ids, plain, descriptors),
    st.builds(More, call_ids, windows),
    st.builds(Cancel, call_ids),
    st.builds(Failure, call_ids, texts, texts, texts, texts),
)


@given(messages)
def test_every_message_round_trips(message: Message) -> None:
    """A decoded message is equal to the encoded one and of the same type."""
    received = decode(encode(message, 1 << 30))
    assert type(received) is type(message)
    assert received == message


@given(messages, st.data())
def test_a_message_that_is_cut_short_is_the_peers_error(message: Message, data: st.DataObject) -> None:
    """At any place, and with anything behind its end."""
    encoded = encode(message, 1 << 30)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    for wrong in (encoded[:cut], encoded + b"\xc0"):
        with pytest.raises(PeerProtocolError):
            decode(wrong)


def test_only_what_a_server_sends_about_calls_is_a_reply() -> None:
    """Replies, failures and parts: the channels tell a client's messages from a server's by that."""
    replies = (Reply(0, None, ()), Failure(0, "", "", ""), Part(0, None, ()))
    others = (
        Request(0, "m", [], {}, ()), OneWayRequest(0, "m", [], {}, ()), StreamRequest(0, "m", [], {}, (), 1),
        More(0, 1), Cancel(0), Goodbye(""),
    )  # fmt: skip
    assert all(is_reply(encode(message)) for message in replies)
    assert not any(is_reply(encode(message)) for message in others)


WRONG: list[list[Any]] = [
    *([10, 0, "m", [], {}, [], window] for window in (0, -1, MAX_WINDOW + 1, 2**63, 1.0, True, None, "1")),
    *([12, 0, count] for count in (0, -1, MAX_WINDOW + 1, 2**63, 1.0, True, None, "1")),
    *([tag, -1, *rest] for tag, rest in ((9, ["m", [], {}, []]), (11, [None, []]), (12, [1]), (13, []))),
    *([tag, 2**63, *rest] for tag, rest in ((9, ["m", [], {}, []]), (11, [None, []]), (12, [1]), (13, []))),
    [9, 0, "m", [], {}],
    [9, 0, "m", [], {}, [], 1],
    [9, 0, "x" * (MAX_NAME_CHARACTERS + 1), [], {}, []],
    [9, 0, "m", {}, {}, []],
    [9, 0, "m", [], {1: 2}, []],
    [10, 0, "m", [], {}, []],
    [10, 0, "m", [], {}, [], 1, 1],
    [10, 0, "m", [], {}, [list(msgspec.structs.astuple(DESCRIPTOR))] * (MAX_TENSORS + 1), 1],
    [11, 0, None],
    [11, 0, None, [], 0],
    [11, 0, None, [[0, [1], "int8", 0]]],
    [12, 0],
    [12, 0, 1, 1],
    [13],
    [13, 0, 0],
    [13, None],
    [8, 0, "", "", "", "", ""],
    [8, 0, "", "", "", 1],
    [8, 0, "", "", "", "x" * 4097],
]


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: repr(fields)[:40])
def test_fields_of_wrong_type_count_or_size_are_the_peers_error(fields: list[Any]) -> None:
    """A window and a count are 1 to 1024; each message has exactly its own fields."""
    with pytest.raises(PeerProtocolError):
        decode(PREAMBLE + msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("window", [1, MAX_WINDOW])
def test_the_limits_themselves_are_allowed(window: int) -> None:
    """Of a window, a count and a failure's traceback."""
    for message in (
        StreamRequest(0, "m", [], {}, (), window),
        More(2**63 - 1, window),
        Failure(0, "", "", "", "x" * 4096),
    ):
        assert decode(encode(message)) == message


def test_a_failure_without_a_traceback_has_an_empty_one() -> None:
    """Also where the sender has left the field out."""
    short = decode(PREAMBLE + msgspec.msgpack.encode([8, 1, "handler", "ValueError", "text"]))
    assert short == Failure(1, "handler", "ValueError", "text", "")


# --- streams ----------------------------------------------------------------------------------------------------------


class Pair(ProtocolPair):
    """A client's and a server's protocol, with streams and one-way calls."""

    def open_stream(self, *arguments: Any, window: int = 4) -> tuple[StreamInFlight, Call]:
        """A stream that the server has been asked for."""
        stream = StreamInFlight("method", window)
        data = self.client.begin_call(stream, arguments, {})
        self.client.expect_reply(stream)
        call = self.server.take_request(data)
        assert isinstance(call, Call)
        return stream, call

    def send_part(self, call: Call, value: Any) -> CallInFlight | None:
        return self.client.take_reply(self.server.encode_part(call.call_id, value))


def test_a_streams_request_tells_its_window() -> None:
    """And a call's that there is one reply; a one-way call's that there is none."""
    pair = Pair()
    _, call = pair.open_stream(1, window=17)
    assert (call.method, call.arguments, call.window, call.is_answered) == ("method", (1,), 17, True)
    _, call = pair.submit(2)
    assert (call.window, call.is_answered) == (0, True)
    one_way = OneWayCall("method")
    received = pair.server.take_request(pair.client.begin_call(one_way, [torch.ones(3)], {}))
    assert isinstance(received, Call)
    assert (received.window, received.is_answered) == (0, False)
    assert len(pair.client) == 2, "nothing answers it"


@given(st.lists(plain, max_size=12), st.integers(12, MAX_WINDOW))
def test_parts_come_out_as_they_went_in(parts: list[Any], window: int) -> None:
    """In order; then the end, again and again."""
    pair = Pair(1 << 30)
    stream, call = pair.open_stream(window=window)
    assert not stream.ready
    for part in parts:
        assert pair.send_part(call, part) is stream
        assert stream.ready
        assert not stream.ended
    pair.client.take_reply(pair.server.encode_reply(call.call_id, None))
    assert stream.ended
    assert len(pair.client) == 0
    assert [stream.take_part() for _ in parts] == parts
    for _ in range(2):
        with pytest.raises(StopIteration):
            stream.take_part()


def test_an_error_comes_after_the_parts() -> None:
    """Those that had arrived are not lost by it."""
    pair = Pair()
    stream, call = pair.open_stream()
    pair.send_part(call, 1)
    pair.send_part(call, 2)
    pair.client.take_reply(pair.server.encode_failure(call.call_id, ValueError("x"), "the traceback"))
    assert [stream.take_part(), stream.take_part()] == [1, 2]
    with pytest.raises(RemoteError, match="ValueError: x") as caught:
        stream.take_part()
    assert caught.value.remote_traceback == "the traceback"


@given(st.integers(1, 40), st.lists(st.booleans(), max_size=200))
def test_a_server_that_keeps_to_its_window_is_never_refused_and_never_stuck(window: int, steps: list[bool]) -> None:
    """Whenever parts are sent and taken: what was granted is at most the window, and taking all grants some more."""
    pair = Pair()
    stream, call = pair.open_stream(window=window)
    credit, sent, taken = window, 0, 0
    for sends in steps:
        if sends and credit:
            pair.send_part(call, sent)
            sent, credit = sent + 1, credit - 1
        elif not sends and sent > taken:
            assert stream.take_part() == taken
            taken += 1
            data = stream.more()
            if data is not None:
                more = pair.server.take_request(data)
                assert isinstance(more, More)
                assert more.call_id == call.call_id
                credit += more.count
        assert credit + sent - taken <= window
    while sent > taken:
        stream.take_part()
        taken += 1
        data = stream.more()
        credit += 0 if data is None else _count(pair, data)
    assert credit > 0
    assert credit > window // 2 or credit == window


def _count(pair: Pair, data: bytes) -> int:
    more = pair.server.take_request(data)
    assert isinstance(more, More)
    return more.count


@pytest.mark.parametrize("window", [1, 2, 7, MAX_WINDOW])
def test_more_parts_than_the_window_are_the_peers_error(window: int) -> None:
    """Also where some were taken, as long as the server was not told so."""
    pair = Pair()
    stream, call = pair.open_stream(window=window)
    for number in range(window):
        pair.send_part(call, number)
    with pytest.raises(PeerProtocolError, match=f"more parts of 'method' than the {window} it may"):
        pair.send_part(call, -1)
    if window > 2:
        pair = Pair()
        stream, call = pair.open_stream(window=window)
        for number in range(window):
            pair.send_part(call, number)
        stream.take_part()
        assert stream.more() is None
        with pytest.raises(PeerProtocolError):
            pair.send_part(call, -1)


def test_a_part_for_a_single_call_is_the_peers_error() -> None:
    """A reply for a stream, however, is its end."""
    pair = Pair()
    pending, call = pair.submit()
    with pytest.raises(PeerProtocolError, match="a part of a stream for 'method', which is a single call"):
        pair.send_part(call, 1)
    stream, call = pair.open_stream()
    pair.client.take_reply(pair.server.encode_reply(call.call_id, 5))
    with pytest.raises(StopIteration):
        stream.take_part()
    assert not pending.ended


@pytest.mark.parametrize("end", ["reply", "failure", "give up", "never asked for"])
def test_a_part_after_the_end_is_released(end: str) -> None:
    """It belongs to no call; its tensors are released, and other calls are untouched."""
    pair = Pair()
    pending, other = pair.submit()
    stream, call = pair.open_stream()
    if end == "reply":
        pair.client.take_reply(pair.server.encode_reply(call.call_id, None))
    elif end == "failure":
        pair.client.take_reply(pair.server.encode_failure(call.call_id, ValueError()))
    elif end == "give up":
        pair.client.give_up(stream, CallCancelled("closed"))
    else:
        call.call_id = 2**63 - 1
    assert pair.send_part(call, [torch.ones(3), 1]) is None
    assert not pair.down.held
    assert pair.client.take_reply(pair.server.encode_reply(other.call_id, 1)) is pending


def test_dropped_parts_are_released() -> None:
    """A stream that is given up holds nothing once its parts have been dropped."""
    pair = Pair()
    stream, call = pair.open_stream()
    for _ in range(3):
        pair.send_part(call, torch.ones(3))
    assert len(pair.down.held) == 3
    part = stream.take_part()
    pair.client.give_up(stream, CallCancelled("closed"))
    stream.drop_parts()
    assert len(pair.down.held) == 1
    del part
    assert not pair.down.held
    with pytest.raises(CallCancelled):
        stream.take_part()
    assert stream.more() is None, "a stream that has ended asks for nothing"


def test_a_lost_connection_ends_streams_after_their_parts() -> None:
    """What had arrived is still there."""
    pair = Pair()
    stream, call = pair.open_stream()
    pair.send_part(call, 1)
    assert pair.client.fail_all(PeerDied("gone")) == [stream]
    assert stream.take_part() == 1
    with pytest.raises(PeerDied):
        stream.take_part()


def test_a_part_that_is_too_large_holds_nothing() -> None:
    """It can't be sent, and its tensors are released."""
    pair = Pair(1024)
    _, call = pair.open_stream()
    with pytest.raises(MessageTooLarge):
        pair.server.encode_part(call.call_id, [torch.ones(3), "x" * 2000])
    assert not pair.down.held


@pytest.mark.parametrize("message", [Part(0, None, ()), Reply(0, None, ()), Failure(0, "", "", "")])
def test_a_client_that_answers_is_the_servers_peers_error(message: Message) -> None:
    """Only a server answers calls."""
    with pytest.raises(PeerProtocolError, match="where only requests are valid"):
        Pair().server.take_request(encode(message))


@pytest.mark.parametrize("message", [More(0, 1), Cancel(0), StreamRequest(0, "m", [], {}, (), 1)])
def test_a_server_that_asks_is_the_clients_peers_error(message: Message) -> None:
    """Only a client asks."""
    with pytest.raises(PeerProtocolError, match="where only replies are valid"):
        Pair().client.take_reply(encode(message))


def test_a_cancellation_names_its_call() -> None:
    """And a server takes any number, whether there is such a call or not."""
    server = Pair().server
    for call_id in (0, 1, 2**63 - 1):
        assert server.take_request(encode(Cancel(call_id))) == Cancel(call_id)
