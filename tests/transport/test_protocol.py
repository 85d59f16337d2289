"""The protocol without I/O: replies find their calls, both sides count the same, and nothing stays held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shmtransport import errors
from shmtransport.errors import CallTimeout, PeerDied, RemoteError, TransportError
from shmtransport.protocol import PendingReply

from .protocols import Link, never_wait

# --- calls and replies ------------------------------------------------------------------------------------------------


def test_a_call_arrives_as_it_was_made() -> None:
    """Method, arguments and keywords arrive; tensors stand where they stood."""
    link = Link()
    data = link.client.request(
        PendingReply("linear", never_wait), (torch.arange(3), [1, (2, 3)]), {"layer": 4, "bias": np.ones(2)}
    )
    call = link.server.receive(data)
    assert call is not None
    assert call.method == "linear"
    assert call.arguments[0].tolist() == [0, 1, 2]
    assert call.arguments[1] == [1, (2, 3)]
    assert call.keywords["layer"] == 4
    assert isinstance(call.keywords["bias"], np.ndarray)


def test_replies_out_of_order_find_their_calls() -> None:
    """A reply completes the call whose correlation id it carries, whatever the order."""
    link = Link()
    calls = [link.submit(number) for number in range(5)]
    assert len(link.client) == 5
    assert len({call.call_id for _, call in calls}) == 5
    for index in (3, 0, 4, 1, 2):
        pending, call = calls[index]
        assert not pending.done
        completed = link.client.receive(link.server.reply(call.call_id, torch.tensor(call.arguments[0])))
        assert completed is pending
        assert pending.done
    assert [pending.result().item() for pending, _ in calls] == [0, 1, 2, 3, 4]
    assert len(link.client) == 0


def test_a_result_can_be_asked_for_again() -> None:
    """A result, or an error, is the same on every call of ``result``."""
    link = Link()
    pending, call = link.submit()
    link.client.receive(link.server.reply(call.call_id, [1, 2]))
    assert pending.result() is pending.result()
    failed, call = link.submit()
    link.client.receive(link.server.failure(call.call_id, ValueError("no")))
    for _ in range(2):
        with pytest.raises(RemoteError, match="ValueError: no"):
            failed.result()


def test_result_waits_only_if_there_is_no_reply() -> None:
    """``result`` hands itself and its time-out to the wait function, and raises what that leaves behind."""
    waited: list[tuple[PendingReply, float | None]] = []

    def wait(pending: PendingReply, timeout_s: float | None) -> None:
        waited.append((pending, timeout_s))
        pending.resolve("now")

    pending = PendingReply("method", wait)
    assert not waited
    assert pending.result(2.5) == "now"
    assert pending.result() == "now"
    assert waited == [(pending, 2.5)]


def test_results_hold_their_tensors_until_they_are_dropped() -> None:
    """Arguments are released when the call is dropped, results when the reply's handle and the result are."""
    link = Link()
    pending, call = link.submit(torch.ones(2), [torch.ones(3)])
    assert len(link.up.held) == 2
    data = link.server.reply(call.call_id, {"out": torch.zeros(4)})
    del call
    assert not link.up.held
    link.client.receive(data)
    result = pending.result()
    assert len(link.down.held) == 1
    del pending
    assert len(link.down.held) == 1
    del result
    assert not link.down.held


def test_snapshots_are_private_copies() -> None:
    """With ``snapshot`` a result is the caller's own memory, and its borrow is released at once."""
    link = Link(snapshot=True)
    pending, call = link.submit()
    link.client.receive(link.server.reply(call.call_id, torch.arange(4)))
    assert not link.down.held
    assert pending.result().tolist() == [0, 1, 2, 3]


def test_a_forgotten_calls_late_reply_is_released() -> None:
    """After ``give_up`` a reply completes nothing, and the tensors in it are released."""
    link = Link()
    pending, call = link.submit()
    link.client.give_up(pending, CallTimeout("late"))
    assert len(link.client) == 0
    assert link.client.receive(link.server.reply(call.call_id, [torch.ones(2), torch.ones(3)])) is None
    with pytest.raises(CallTimeout, match="late"):
        pending.result()
    assert not link.down.held
    link.client.give_up(pending, CallTimeout("late"))  # and once more does nothing


def test_a_forgotten_calls_late_failure_is_ignored() -> None:
    """Nobody wants it any more."""
    link = Link()
    pending, call = link.submit()
    link.client.give_up(pending, CallTimeout("late"))
    assert link.client.receive(link.server.failure(call.call_id, ValueError("too late"))) is None
    with pytest.raises(CallTimeout):
        pending.result()


def test_a_second_reply_to_one_call_changes_nothing() -> None:
    """A server that answers twice can't replace a result; the second answer's tensors are released."""
    link = Link()
    pending, call = link.submit()
    link.client.receive(link.server.reply(call.call_id, "first"))
    assert link.client.receive(link.server.reply(call.call_id, torch.ones(1))) is None
    assert link.client.receive(link.server.failure(call.call_id, ValueError())) is None
    assert pending.result() == "first"
    assert not link.down.held


def test_a_forgotten_call_does_not_touch_others() -> None:
    """Ids are not used again: a late reply can't complete a later call."""
    link = Link()
    first, first_call = link.submit("first")
    link.client.give_up(first, CallTimeout("late"))
    second, second_call = link.submit("second")
    assert first_call.call_id != second_call.call_id
    link.client.receive(link.server.reply(first_call.call_id, "late"))
    assert not second.done
    link.client.receive(link.server.reply(second_call.call_id, "right"))
    assert second.result() == "right"


# --- counters ---------------------------------------------------------------------------------------------------------


def test_both_sides_count_the_same_bytes() -> None:
    """What one side sent, the other received: tensor bytes and control bytes, in both directions."""
    link = Link()
    pending, call = link.submit(torch.ones(100), np.ones(10))
    link.client.receive(link.server.reply(call.call_id, torch.ones(7)))
    pending.result()
    client, server = link.client_counters.snapshot(), link.server_counters.snapshot()
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
    link = Link()
    link.fail(ValueError("no"))
    snapshot = link.client_counters.snapshot()
    assert (snapshot.calls, snapshot.failures) == (1, 1)


def test_every_error_belongs_to_the_tree() -> None:
    """All of errors.py derives from TransportError; time-outs and lost connections are also Python's own kinds."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, TransportError) for kind in kinds)
    assert issubclass(CallTimeout, TimeoutError)
    assert issubclass(errors.ConnectTimeout, TimeoutError)
    assert issubclass(PeerDied, ConnectionError)
    assert issubclass(errors.ConnectRefused, ConnectionError)
