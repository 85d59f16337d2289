"""The protocol without I/O: failures become the right errors, and nothing of the server's travels with them."""

from __future__ import annotations

import pytest

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
from shmtransport.protocol.messages import Failure, decode, encode
from tests.support.protocols import ProtocolPair


@pytest.mark.parametrize("kind", [ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError])
def test_the_callers_own_errors_keep_their_class(kind: type[TransportError]) -> None:
    """An error that the caller can fix arrives from the server as the same class, with its figures."""
    error = ProtocolPair().fail(kind("requested 128 MiB; arena is 64 MiB"))
    assert type(error) is kind
    assert str(error) == "on the server: requested 128 MiB; arena is 64 MiB"


@pytest.mark.parametrize("kind", [PeerDied, PeerProtocolError, Closed, CallTimeout])
def test_the_servers_other_troubles_are_remote_errors(kind: type[TransportError]) -> None:
    """A handler whose own peer died must not look like this server's death."""
    error = ProtocolPair().fail(kind("the other one"))
    assert type(error) is RemoteError
    assert error.type_name == kind.__name__


def test_a_handlers_exception_is_a_remote_error() -> None:
    """Class name and text travel."""
    error = ProtocolPair().fail(ZeroDivisionError("division by zero"))
    assert isinstance(error, RemoteError)
    assert (error.type_name, error.message) == ("ZeroDivisionError", "division by zero")
    assert str(error) == "the server's handler raised ZeroDivisionError: division by zero"


@pytest.mark.parametrize("kind", ["", "handler", "SystemExit", "TransportError", "PeerDied", "__class__", "x" * 256])
def test_an_unknown_kind_is_a_remote_error(kind: str) -> None:
    """A server can't choose which class is raised beyond the four that it may."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    pair.client.take_reply(encode(Failure(call.call_id, kind, "Name", "text")))
    with pytest.raises(RemoteError, match="raised Name: text") as caught:
        pending.take_result()
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
    pair = ProtocolPair()
    for error in (
        _raised(),
        FileNotFoundError(2, "No such file", "/secret/a", None, "/secret/b"),
    ):
        _pending, call = pair.submit()
        data = pair.server.encode_failure(call.call_id, error)
        for word in (b"secret", b"Traceback", __file__.encode(), b"line "):
            assert word not in data
    assert "No such file" in str(pair.fail(_raised()))


def test_no_traceback_travels() -> None:
    """Neither the handler's frames nor its chained exceptions are in the bytes."""
    try:
        try:
            raise KeyError("inner secret")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as error:
        data = ProtocolPair().server.encode_failure(0, error)
    for word in (b"inner secret", b"Traceback", b"test_protocol", b"KeyError"):
        assert word not in data
    assert b"outer" in data


def test_a_long_error_is_cut_and_still_arrives() -> None:
    """An error's text and class name are cut to what a failure takes."""
    kind = type("E" * 1000, (Exception,), {})
    error = ProtocolPair().fail(kind("x" * 100_000))
    assert isinstance(error, RemoteError)
    assert len(error.message) == 4096
    assert error.message.endswith("…")
    assert len(error.type_name) == 256


def test_no_path_travels_with_an_import_error() -> None:
    """The text of an ImportError names the module's file; that must not travel."""
    try:
        from os import no_such_name  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        data = ProtocolPair().server.encode_failure(0, error)
    assert b".py" not in data


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [ValueError("\udcff"), _Mute()], ids=["surrogate", "no text"])
def test_every_exception_can_be_answered(error: BaseException) -> None:
    """Whatever a handler raises, its caller gets a failure: also text that UTF-8 can't hold, or none at all."""
    message = decode(ProtocolPair().server.encode_failure(0, error))
    assert isinstance(message, Failure)
    assert message.type_name == type(error).__name__


def test_a_failure_fits_every_message_limit() -> None:
    """Where messages are small, so is the failure's text."""
    pair = ProtocolPair(max_message_bytes=1024)
    assert len(pair.server.encode_failure(0, ValueError("x" * 5000))) <= 1024


def test_fail_all_ends_every_call_with_the_same_error() -> None:
    """When the connection ends, no call waits forever; completed ones keep their results."""
    pair = ProtocolPair()
    done, call = pair.submit()
    pair.client.take_reply(pair.server.encode_reply(call.call_id, 1))
    waiting = [pair.submit()[0] for _ in range(3)]
    error = PeerDied("the server's process ended")
    pair.client.fail_all(error)
    assert len(pair.client) == 0
    for pending in waiting:
        assert pending.ended
        with pytest.raises(PeerDied) as caught:
            pending.take_result()
        assert str(caught.value) == str(error)
        assert caught.value.sent, "the server may have handled it"
    assert done.take_result() == 1
