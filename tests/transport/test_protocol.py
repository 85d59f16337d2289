"""The protocol without I/O: replies find their calls, failures become the right errors, and nothing stays held."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from shmtransport import errors
from shmtransport.descriptor import TensorDescriptor
from shmtransport.dtypes import BY_NAME, BY_TORCH
from shmtransport.errors import (
    ArenaFull,
    CallTimeout,
    Closed,
    LocalProtocolError,
    MessageTooLarge,
    PeerDied,
    PeerProtocolError,
    RemoteError,
    TensorTooLarge,
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
    decode,
    encode,
)
from shmtransport.protocol import Call, ClientProtocol, Codec, PendingReply, ServerProtocol
from shmtransport.statistics import Counters


class Direction:
    """Stands in for both ends of one direction: a dict of what was sent, by sequence.

    ``held`` are the sequences that the receiver has not released; ``room`` is how many more tensors fit.
    """

    def __init__(self) -> None:
        self.sent: dict[int, torch.Tensor] = {}
        self.held: set[int] = set()
        self.room = 1_000_000
        self._sequence = 0

    def export(self, tensor: torch.Tensor) -> TensorDescriptor:
        if self.room == 0:
            raise ArenaFull("requested 1 MiB; arena is 1 MiB")
        self.room -= 1
        self._sequence += 1
        self.sent[self._sequence] = tensor
        self.held.add(self._sequence)
        return TensorDescriptor(0, tuple(tensor.shape), BY_TORCH[tensor.dtype].name, 0, self._sequence)

    def export_array(self, array: np.ndarray[Any, Any]) -> TensorDescriptor:
        return self.export(torch.from_numpy(array))

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None:
        for descriptor in descriptors:
            self._end(descriptor.sequence)

    def borrow(self, descriptor: TensorDescriptor) -> torch.Tensor:
        if descriptor.sequence not in self.sent or descriptor.dtype not in BY_NAME:
            raise PeerProtocolError(f"descriptor with sequence {descriptor.sequence} is invalid")
        view = self.sent[descriptor.sequence].clone()
        weakref.finalize(view, self._end, descriptor.sequence)
        return view

    def _end(self, sequence: int) -> None:
        self.held.discard(sequence)
        self.sent.pop(sequence, None)


class Link:
    """A client's and a server's protocol with nothing between them."""

    def __init__(self, max_message_bytes: int = 65536, *, snapshot: bool = False) -> None:
        self.up, self.down = Direction(), Direction()
        self.client_counters, self.server_counters = Counters(), Counters()
        self.client = ClientProtocol(
            Codec(self.up, self.down, self.client_counters, max_message_bytes, snapshot=snapshot), self.client_counters
        )
        self.server = ServerProtocol(
            Codec(self.down, self.up, self.server_counters, max_message_bytes), self.server_counters
        )

    def request(self, *arguments: Any, **keywords: Any) -> tuple[PendingReply, bytes]:
        return self.client.request("method", arguments, keywords, _never_wait)

    def submit(self, *arguments: Any, **keywords: Any) -> tuple[PendingReply, Call]:
        """A request, received by the server."""
        pending, data = self.request(*arguments, **keywords)
        call = self.server.receive(data)
        assert call is not None
        return pending, call

    def fail(self, error: BaseException) -> TransportError:
        """What the client raises for a handler's error."""
        pending, call = self.submit()
        self.client.receive(self.server.failure(call.call_id, error))
        with pytest.raises(TransportError) as caught:
            pending.result()
        return caught.value


def _never_wait(_pending: PendingReply, _timeout_s: float | None) -> None:
    raise AssertionError("waited for a reply that is there")


# --- calls and replies ------------------------------------------------------------------------------------------------


def test_a_call_arrives_as_it_was_made() -> None:
    """Method, arguments and keywords arrive; tensors stand where they stood."""
    link = Link()
    _, data = link.client.request(
        "linear", (torch.arange(3), [1, (2, 3)]), {"layer": 4, "bias": np.ones(2)}, _never_wait
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
    link = Link()
    waited: list[tuple[PendingReply, float | None]] = []

    def wait(pending: PendingReply, timeout_s: float | None) -> None:
        waited.append((pending, timeout_s))
        pending.resolve("now")

    pending, _ = link.client.request("method", (), {}, wait)
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


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError])
def test_the_callers_own_errors_keep_their_class(kind: type[TransportError]) -> None:
    """What the caller can mend on the server's side arrives as the same class, with its figures."""
    error = Link().fail(kind("requested 128 MiB; arena is 64 MiB"))
    assert type(error) is kind
    assert str(error) == "on the server: requested 128 MiB; arena is 64 MiB"


@pytest.mark.parametrize("kind", [PeerDied, PeerProtocolError, Closed, CallTimeout])
def test_the_servers_other_troubles_are_remote_errors(kind: type[TransportError]) -> None:
    """A handler whose own peer died must not look like this server's death."""
    error = Link().fail(kind("the other one"))
    assert type(error) is RemoteError
    assert error.type_name == kind.__name__


def test_a_handlers_exception_is_a_remote_error() -> None:
    """Class name and text travel."""
    error = Link().fail(ZeroDivisionError("division by zero"))
    assert isinstance(error, RemoteError)
    assert (error.type_name, error.message) == ("ZeroDivisionError", "division by zero")
    assert str(error) == "the server's handler raised ZeroDivisionError: division by zero"


@pytest.mark.parametrize("kind", ["", "handler", "SystemExit", "TransportError", "PeerDied", "__class__", "x" * 256])
def test_an_unknown_kind_is_a_remote_error(kind: str) -> None:
    """A server can't choose which class is raised beyond the four that it may."""
    link = Link()
    pending, call = link.submit()
    link.client.receive(encode(Failure(call.call_id, kind, "Name", "text")))
    with pytest.raises(RemoteError, match="raised Name: text") as caught:
        pending.result()
    assert type(caught.value) is RemoteError


def _raised() -> BaseException:
    try:
        with open("/very/secret/path"):
            pass
    except OSError as error:
        return error
    raise AssertionError


def test_no_path_travels_with_an_operating_system_error() -> None:
    """An OSError's text has its reason, never its file names or a traceback."""
    link = Link()
    for error in (
        _raised(),
        FileNotFoundError(2, "No such file", "/secret/a", None, "/secret/b"),
    ):
        _pending, call = link.submit()
        data = link.server.failure(call.call_id, error)
        for word in (b"secret", b"Traceback", __file__.encode(), b"line "):
            assert word not in data
    assert "No such file" in str(link.fail(_raised()))


def test_no_traceback_travels() -> None:
    """Neither the handler's frames nor its chained exceptions are in the bytes."""
    try:
        try:
            raise KeyError("inner secret")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as error:
        data = Link().server.failure(0, error)
    for word in (b"inner secret", b"Traceback", b"test_protocol", b"KeyError"):
        assert word not in data
    assert b"outer" in data


def test_a_long_error_is_cut_and_still_arrives() -> None:
    """An error's text and class name are cut to what a failure takes."""
    kind = type("E" * 1000, (Exception,), {})
    error = Link().fail(kind("x" * 100_000))
    assert isinstance(error, RemoteError)
    assert len(error.message) == 4096
    assert error.message.endswith("…")
    assert len(error.type_name) == 256


def test_no_path_travels_with_an_import_error() -> None:
    """The text of an ImportError names the module's file; that must not travel."""
    try:
        from os import no_such_name  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        data = Link().server.failure(0, error)
    assert b".py" not in data


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [ValueError("\udcff"), _Mute()], ids=["surrogate", "no text"])
def test_every_exception_can_be_answered(error: BaseException) -> None:
    """Whatever a handler raises, its caller gets a failure: also text that UTF-8 can't hold, or none at all."""
    message = decode(Link().server.failure(0, error))
    assert isinstance(message, Failure)
    assert message.type_name == type(error).__name__


def test_a_failure_fits_every_message_limit() -> None:
    """Where messages are small, so is the failure's text."""
    link = Link(max_message_bytes=1024)
    assert len(link.server.failure(0, ValueError("x" * 5000))) <= 1024


def test_fail_all_ends_every_call_with_the_same_error() -> None:
    """When the connection ends, no call waits for ever; completed ones keep their results."""
    link = Link()
    done, call = link.submit()
    link.client.receive(link.server.reply(call.call_id, 1))
    waiting = [link.submit()[0] for _ in range(3)]
    error = PeerDied("the server's process ended")
    link.client.fail_all(error)
    assert len(link.client) == 0
    for pending in waiting:
        assert pending.done
        with pytest.raises(PeerDied) as caught:
            pending.result()
        assert caught.value is error
    assert done.result() == 1


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
        link.client.request("m" * 300, (), {}, _never_wait)


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
