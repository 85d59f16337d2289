"""The protocol without I/O: replies find their calls, both sides count the same, and nothing stays held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shmtransport import errors
from shmtransport.errors import CallTimeout, LocalProtocolError, PeerDied, RemoteError, TransportError
from shmtransport.protocol.in_flight import CallInFlight
from shmtransport.statistics import Statistics
from tests.support.protocols import ProtocolPair

# --- calls and replies ------------------------------------------------------------------------------------------------


def test_a_call_arrives_as_it_was_made() -> None:
    """Method, arguments and keywords arrive; tensors stand where they stood."""
    pair = ProtocolPair()
    data = pair.client.begin_call(
        CallInFlight("linear"), (torch.arange(3), [1, (2, 3)]), {"layer": 4, "bias": np.ones(2)}
    )
    call = pair.server.take_request(data)
    assert call is not None
    assert call.method == "linear"
    assert call.arguments[0].tolist() == [0, 1, 2]
    assert call.arguments[1] == [1, (2, 3)]
    assert call.keywords["layer"] == 4
    assert isinstance(call.keywords["bias"], np.ndarray)


def test_replies_out_of_order_find_their_calls() -> None:
    """A reply completes the call whose correlation id it carries, whatever the order."""
    pair = ProtocolPair()
    calls = [pair.submit(number) for number in range(5)]
    assert len(pair.client) == 5
    assert len({call.call_id for _, call in calls}) == 5
    for index in (3, 0, 4, 1, 2):
        pending, call = calls[index]
        assert not pending.ended
        completed = pair.client.take_reply(pair.server.encode_reply(call.call_id, torch.tensor(call.arguments[0])))
        assert completed is pending
        assert pending.ended
    assert [pending.take_result().item() for pending, _ in calls] == [0, 1, 2, 3, 4]
    assert len(pair.client) == 0


def test_a_result_can_be_asked_for_again() -> None:
    """A result, or an error, is the same on every call of ``result``."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    pair.client.take_reply(pair.server.encode_reply(call.call_id, [1, 2]))
    assert pending.take_result() is pending.take_result()
    failed, call = pair.submit()
    pair.client.take_reply(pair.server.encode_failure(call.call_id, ValueError("no")))
    for _ in range(2):
        with pytest.raises(RemoteError, match="ValueError: no"):
            failed.take_result()


def test_a_result_with_tensors_is_handed_out_once() -> None:
    """So the handle on a call keeps no room of the arena; asking again is the caller's error."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    pair.client.take_reply(pair.server.encode_reply(call.call_id, [torch.ones(3), 1]))
    assert pending.take_result()[1] == 1
    assert not pair.down.held
    with pytest.raises(LocalProtocolError, match="handed out once"):
        pending.take_result()


def test_results_hold_their_tensors_until_they_are_dropped() -> None:
    """Arguments are released when the call is dropped, results when the reply's handle and the result are."""
    pair = ProtocolPair()
    pending, call = pair.submit(torch.ones(2), [torch.ones(3)])
    assert len(pair.up.held) == 2
    data = pair.server.encode_reply(call.call_id, {"out": torch.zeros(4)})
    del call
    assert not pair.up.held
    pair.client.take_reply(data)
    result = pending.take_result()
    assert len(pair.down.held) == 1
    del pending
    assert len(pair.down.held) == 1
    del result
    assert not pair.down.held


def test_snapshots_are_private_copies() -> None:
    """With ``snapshot`` a result is the caller's own memory, and its borrow is released at once."""
    pair = ProtocolPair(snapshot=True)
    pending, call = pair.submit()
    pair.client.take_reply(pair.server.encode_reply(call.call_id, torch.arange(4)))
    assert not pair.down.held
    assert pending.take_result().tolist() == [0, 1, 2, 3]


def test_a_forgotten_calls_late_reply_is_released() -> None:
    """After ``give_up`` a reply completes nothing, and the tensors in it are released."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    pair.client.give_up(pending, CallTimeout("late"))
    assert len(pair.client) == 0
    assert pair.client.take_reply(pair.server.encode_reply(call.call_id, [torch.ones(2), torch.ones(3)])) is None
    with pytest.raises(CallTimeout, match="late"):
        pending.take_result()
    assert not pair.down.held
    pair.client.give_up(pending, CallTimeout("late"))  # and once more does nothing


def test_a_forgotten_calls_late_failure_is_ignored() -> None:
    """Its caller has given it up."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    pair.client.give_up(pending, CallTimeout("late"))
    assert pair.client.take_reply(pair.server.encode_failure(call.call_id, ValueError("too late"))) is None
    with pytest.raises(CallTimeout):
        pending.take_result()


def test_a_second_reply_to_one_call_changes_nothing() -> None:
    """A server that answers twice can't replace a result; the second answer's tensors are released."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    pair.client.take_reply(pair.server.encode_reply(call.call_id, "first"))
    assert pair.client.take_reply(pair.server.encode_reply(call.call_id, torch.ones(1))) is None
    assert pair.client.take_reply(pair.server.encode_failure(call.call_id, ValueError())) is None
    assert pending.take_result() == "first"
    assert not pair.down.held


def test_a_forgotten_call_does_not_touch_others() -> None:
    """Ids are not used again: a late reply can't complete a later call."""
    pair = ProtocolPair()
    first, first_call = pair.submit("first")
    pair.client.give_up(first, CallTimeout("late"))
    second, second_call = pair.submit("second")
    assert first_call.call_id != second_call.call_id
    pair.client.take_reply(pair.server.encode_reply(first_call.call_id, "late"))
    assert not second.ended
    pair.client.take_reply(pair.server.encode_reply(second_call.call_id, "right"))
    assert second.take_result() == "right"


# --- counters ---------------------------------------------------------------------------------------------------------


def test_both_sides_count_the_same_bytes() -> None:
    """What one side sent, the other received: tensor bytes and control bytes, in both directions."""
    pair = ProtocolPair()
    pending, call = pair.submit(torch.ones(100), np.ones(10))
    pair.client.take_reply(pair.server.encode_reply(call.call_id, torch.ones(7)))
    pending.take_result()
    client, server = Statistics.of(pair.client_counters), Statistics.of(pair.server_counters)
    assert client.tensor_bytes_sent == server.tensor_bytes_received == 480
    assert server.tensor_bytes_sent == client.tensor_bytes_received == 28
    assert client.control_bytes_sent == server.control_bytes_received > 0
    assert server.control_bytes_sent == client.control_bytes_received > 0
    assert (client.calls, client.failures) == (1, 0)
    assert client.serialize_seconds > 0
    assert client.deserialize_seconds > 0
    assert client.call_seconds > 0


def test_failures_are_counted() -> None:
    """A failed call is a call and a failure."""
    pair = ProtocolPair()
    pair.fail(ValueError("no"))
    snapshot = Statistics.of(pair.client_counters)
    assert (snapshot.calls, snapshot.failures) == (1, 1)


def test_every_error_belongs_to_the_tree() -> None:
    """All of errors.py derives from TransportError; time-outs and lost connections are also Python's own kinds."""
    kinds = [kind for kind in vars(errors).values() if getattr(kind, "__module__", "") == errors.__name__]
    assert all(issubclass(kind, TransportError) for kind in kinds)
    assert issubclass(CallTimeout, TimeoutError)
    assert issubclass(errors.ConnectTimeout, TimeoutError)
    assert issubclass(PeerDied, ConnectionError)
    assert issubclass(errors.ConnectRefused, ConnectionError)
