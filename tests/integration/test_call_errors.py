"""Calls that fail: what the caller gets, and that the connection and the server go on."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
from typing import Any

import pytest
import torch

from shmtransport import CallTimeout, Client, LocalProtocolError, RemoteError, Server, TransportError
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import DeliberateError, Serve, echo


def test_a_handlers_exception_arrives_as_type_and_message_only(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """RemoteError names the class and the text; no traceback, no file, no line travels."""

    def fail(text: str) -> None:
        raise DeliberateError(text)

    serve(fail=fail, echo=echo)
    with Client(address, channel=channel) as client:
        with pytest.raises(RemoteError) as caught:
            client.call("fail", "layer 3 has no weights")
        assert caught.value.type_name == "DeliberateError"
        assert caught.value.message == "layer 3 has no weights"
        assert "Traceback" not in str(caught.value)
        assert os.path.dirname(__file__) not in str(caught.value)
        assert ".py" not in str(caught.value)
        assert client.call("echo", 1) == 1


def test_a_missing_file_on_the_server_does_not_tell_its_path(serve: Serve, address: str, channel: ChannelKind) -> None:
    """An OSError's file names stay on the server."""
    serve(read=lambda: open("/secret/place/weights.bin").close())
    with Client(address, channel=channel) as client, pytest.raises(RemoteError, match="No such file") as caught:
        client.call("read")
    assert caught.value.type_name == "FileNotFoundError"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [TimeoutError("the GPU took too long"), CallTimeout("no reply from the next server within 5 s")], ids=repr
)
def test_a_handlers_own_words_arrive_whatever_the_class(
    serve: Serve, address: str, error: Exception, channel: ChannelKind
) -> None:
    """Errors that merely derive from OSError and name no file keep their message."""

    def fail() -> None:
        raise error

    serve(fail=fail)
    with Client(address, channel=channel) as client, pytest.raises(RemoteError) as caught:
        client.call("fail")
    assert (caught.value.type_name, caught.value.message) == (type(error).__name__, str(error))


class UnprintableError(Exception):
    """An exception that can't be turned into text."""

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    "error",
    [DeliberateError("\ud800 is no character"), DeliberateError("x" * 100_000), UnprintableError()],
    ids=["surrogate", "long", "unprintable"],
)
def test_no_exception_of_a_handler_can_end_the_server(
    serve: Serve, address: str, error: Exception, channel: ChannelKind
) -> None:
    """However odd its text, the caller gets an error and the server goes on serving."""

    def fail() -> None:
        raise error

    serve(fail=fail, echo=echo)
    with Client(address, channel=channel, timeout_s=5.0) as client:
        with pytest.raises(RemoteError):
            client.call("fail")
        assert client.call("echo", 1) == 1


def test_an_error_longer_than_the_message_limit_does_not_end_the_server(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """A server with a small max_message_bytes cuts the text; it never fails to report a failure."""

    def fail() -> None:
        raise DeliberateError("x" * 4000)

    serve({"max_message_bytes": 1024}, fail=fail, echo=echo)
    with Client(address, channel=channel, timeout_s=5.0) as client:
        with pytest.raises(TransportError):
            client.call("fail")
        assert client.call("echo", 1) == 1


def test_an_unknown_method_is_named_with_those_there_are(shared_server: str, channel: ChannelKind) -> None:
    """The error is a LocalProtocolError: the mistake is the caller's."""
    with (
        Client(shared_server, channel=channel) as client,
        pytest.raises(LocalProtocolError, match=r"'doubel'; there are: double, drop, echo"),
    ):
        client.call("doubel")


@pytest.mark.parametrize(("arguments", "keywords"), [((), {}), ((1, 2), {}), ((1,), {"y": 2})])
def test_wrong_arguments_are_the_handlers_type_error(
    shared_server: str, arguments: Any, keywords: Any, channel: ChannelKind
) -> None:
    """Python's own message arrives, and the server serves on."""
    with Client(shared_server, channel=channel) as client:
        with pytest.raises(RemoteError, match="argument") as caught:
            client.call("sleep", *arguments, **keywords)
        assert caught.value.type_name == "TypeError"
        assert client.call("echo", 1) == 1


def test_a_result_that_cant_be_sent_fails_the_call_only(serve: Serve, address: str, channel: ChannelKind) -> None:
    """The caller gets the reason; blocks that the result had already taken are free again."""
    server: Server

    def bad() -> list[object]:
        return [server.empty((1024,), torch.float32), object()]

    server = serve(bad=bad, echo=echo)
    with Client(address, channel=channel, arena_bytes=64 * 1024) as client:
        for _ in range(40):
            with pytest.raises(LocalProtocolError, match="type object"):
                client.call("bad")
        assert client.call("echo", 1) == 1


def test_after_a_timeout_the_connection_works_and_the_late_result_is_released(
    serve: Serve, address: str, channel: ChannelKind
) -> None:
    """CallTimeout ends one call: the late reply is thrown away and its block is free again."""
    server: Server
    go = threading.Event()

    def slow() -> torch.Tensor:
        go.wait(10)
        go.clear()
        return server.empty((48 * 1024,), torch.uint8)  # of a 64 KiB arena

    server = serve(slow=slow, echo=echo)
    with Client(address, channel=channel, arena_bytes=64 * 1024) as client:
        for _ in range(3):
            with pytest.raises(CallTimeout, match=r"'slow' within 0\.05 s.*0 other calls.*alive"):
                client.with_options(timeout_s=0.05).call("slow")
            go.set()
            assert client.call("echo", "next") == "next"
        go.set()
        assert client.call("slow").numel() == 48 * 1024


def test_the_clients_own_timeout_is_the_default(serve: Serve, address: str, channel: ChannelKind) -> None:
    """``timeout_s`` of the client holds where a call names none."""
    go = threading.Event()
    serve(slow=lambda: go.wait(10))
    with Client(address, channel=channel, timeout_s=0.05) as client:
        with pytest.raises(CallTimeout):
            client.call("slow")
        go.set()


def test_a_failed_call_keeps_nothing_until_a_collection(
    serve: Serve, address: str, channel: ChannelKind, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that was caught and dropped holds no argument: without garbage collection there is room for the next."""
    caplog.set_level(logging.CRITICAL, "shmtransport")  # a captured record would hold the traceback

    def fail(x: torch.Tensor) -> None:
        raise DeliberateError(f"not {x.numel()} bytes")

    serve(fail=fail)
    gc.disable()
    try:
        with Client(address, channel=channel, arena_bytes=64 * 1024) as client:
            for _ in range(5):
                loan = client.empty((32 * 1024,), torch.uint8)
                with contextlib.suppress(RemoteError):
                    client.call("fail", loan)
                with contextlib.suppress(LocalProtocolError):
                    client.call("no such", loan)
                del loan
    finally:
        gc.enable()
