"""What a client learns of an exception in a handler: type and text, and the traceback from a server in debug mode."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmtransport import AsyncClient, AsyncServer, Client, LocalProtocolError, RemoteError, Server
from shmtransport.protocol.messages import ChannelKind
from tests.support.helpers import DeliberateError, Serve, echo, eventually
from tests.support.loops import AnyServer, by_each_server, on_each_channel, served

pytestmark = pytest.mark.timeout(60)

HERE = Path(__file__).name


def fail(text: str = "on purpose") -> None:
    raise DeliberateError(text)


def deep(levels: int) -> None:
    if levels == 0:
        raise DeliberateError("at the bottom")
    if levels % 2:
        deep(levels - 1)
    else:
        deep(levels - 1)  # another line, since equal ones are not repeated in a traceback


def parts() -> Iterator[int]:
    yield 1
    fail("in a part")


def chained() -> None:
    try:
        fail("first")
    except DeliberateError as error:
        raise ValueError("second") from error


async def in_the_loop() -> None:
    await asyncio.sleep(0)
    fail("in the loop")


async def parts_in_the_loop() -> AsyncIterator[int]:
    yield 1
    fail("in a part")


def caught(client: Client, method: str, *arguments: Any) -> RemoteError:
    with pytest.raises(RemoteError) as raised:
        client.call(method, *arguments)
    return raised.value


@on_each_channel
@by_each_server
@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_travels_from_a_debug_server_alone(
    channel: ChannelKind, address: str, kind: type[AnyServer], debug: bool
) -> None:
    """It names files, lines and functions of the server; by default nothing of these is sent."""

    async def main() -> None:
        handlers: dict[str, Any] = {"fail": fail, "chained": chained}
        if kind is AsyncServer:
            handlers["in_the_loop"] = in_the_loop
        async with (
            served(address, kind, {"debug": debug}, **handlers),
            AsyncClient(address, channel=channel) as client,
        ):
            for name in handlers:
                with pytest.raises(RemoteError) as raised:
                    await client.call(name)
                error = raised.value
                if debug:
                    assert HERE in error.remote_traceback
                    assert "in fail" in error.remote_traceback
                    assert error.remote_traceback.rstrip().endswith(f"{error.type_name}: {error.message}")
                    assert f"On the server:\n{error.remote_traceback}" in str(error)
                    assert "\n" in error.remote_traceback
                else:
                    assert error.remote_traceback == ""
                    assert str(error) == f"the server's handler raised {error.type_name}: {error.message}"
                    assert HERE not in repr(error) + str(error.args)
                assert (name == "chained") == (error.type_name == "ValueError")
                assert ("first" in error.remote_traceback) == (debug and name == "chained")

    asyncio.run(main())


@on_each_channel
@by_each_server
@pytest.mark.parametrize("debug", [False, True])
def test_a_stream_that_fails_tells_as_much_as_a_call(
    channel: ChannelKind, address: str, kind: type[AnyServer], debug: bool
) -> None:
    """After its parts, of plain and asynchronous generators."""

    async def main() -> None:
        handlers: dict[str, Any] = {"parts": parts}
        if kind is AsyncServer:
            handlers["parts_in_the_loop"] = parts_in_the_loop
        async with (
            served(address, kind, {"debug": debug}, **handlers),
            AsyncClient(address, channel=channel) as client,
        ):
            for name in handlers:
                stream = client.stream(name)
                assert await anext(stream) == 1
                with pytest.raises(RemoteError, match="in a part") as raised:
                    await anext(stream)
                assert (HERE in raised.value.remote_traceback) == debug

    asyncio.run(main())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_blocking_server_tells_it_from_each_of_its_threads(
    serve: Serve, address: str, channel: ChannelKind, threads: int
) -> None:
    """With its own frames left out of nothing that the handler did."""
    serve(options={"threads": threads, "debug": True}, fail=fail, parts=parts)
    with Client(address, channel=channel) as client:
        assert "DeliberateError: on purpose" in caught(client, "fail").remote_traceback
        stream = client.stream("parts")
        assert next(stream) == 1
        with pytest.raises(RemoteError) as raised:
            next(stream)
        assert "in parts" in raised.value.remote_traceback


def test_a_file_that_is_not_there_is_not_named_by_default(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Neither in the text of an OSError nor in that of an ImportError."""

    def secret() -> None:
        Path("/no/such/secret").read_text()

    def module() -> None:
        from shmtransport import no_such_name  # noqa: F401

    serve(secret=secret, module=module)
    with Client(address, channel=channel) as client:
        for method in ("secret", "module"):
            error = caught(client, method)
            assert error.remote_traceback == ""
            assert "/" not in error.message


def test_of_a_long_traceback_the_end_is_sent(serve: Serve, address: str, channel: ChannelKind) -> None:
    """4096 characters, which name what failed; long texts and small messages cost the traceback, not the error."""
    serve(options={"debug": True}, deep=deep, fail=fail, echo=echo)
    with Client(address, channel=channel) as client:
        error = caught(client, "deep", 300)
        assert len(error.remote_traceback) <= 4096
        assert error.remote_traceback.rstrip().endswith("DeliberateError: at the bottom")
        error = caught(client, "fail", "x" * 30_000)
        assert error.type_name == "DeliberateError"
        assert error.message.startswith("x" * 4000)
        assert client.call("echo", 1) == 1
    with Client(address, channel=channel, max_message_bytes=1024) as client:
        error = caught(client, "deep", 300)
        assert (error.type_name, error.message, error.remote_traceback) == ("DeliberateError", "at the bottom", "")
        assert client.call("echo", 1) == 1


def test_a_traceback_is_made_printable(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Control characters in it reach no terminal; only its line ends are kept."""
    serve(options={"debug": True}, fail_in_red=lambda: fail("red \x1b[31m\r\x07 \udcff"))
    with Client(address, channel=channel) as client:
        error = caught(client, "fail_in_red")
        assert "\x1b" not in str(error)
        assert "\x07" not in str(error)
        assert "\r" not in str(error)
        assert all(line.isprintable() for line in error.remote_traceback.split("\n"))


def test_this_packages_own_errors_are_raised_as_themselves(serve: Serve, address: str, channel: ChannelKind) -> None:
    """Also by a debug server; the mistake is the caller's, so there is no traceback to tell of."""
    serve(options={"debug": True}, echo=echo, make=object)
    with Client(address, channel=channel) as client:
        for method in ("no such method", "make"):
            with pytest.raises(LocalProtocolError) as raised:
                client.call(method)
            assert HERE not in str(raised.value)
            assert ".py" not in str(raised.value)
        assert client.call("echo", 1) == 1


def test_a_one_way_call_tells_the_log_alone(
    serve: Serve, address: str, channel: ChannelKind, caplog: pytest.LogCaptureFixture
) -> None:
    """With its traceback, in debug mode or not."""
    server = serve(fail=fail, echo=echo)
    with Client(address, channel=channel) as client:
        client.send("fail", "told to the log")
        assert client.call("echo", 1) == 1
    assert eventually(lambda: server.statistics().failures == 1)
    assert "told to the log" in caplog.text
    assert HERE in caplog.text


def test_an_error_with_a_traceback_survives_copies() -> None:
    """Through pickle and copy, with and without one."""
    for error in (RemoteError("ValueError", "text"), RemoteError("ValueError", "text", "File x\nValueError: text")):
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301
            assert type(again) is RemoteError
            assert (again.type_name, again.message) == ("ValueError", "text")
            assert again.remote_traceback == error.remote_traceback
            assert str(again) == str(error)


@pytest.mark.parametrize("kind", [Server, AsyncServer])
@pytest.mark.parametrize("debug", [1, None, "yes"])
def test_debug_is_on_or_off(address: str, kind: type[AnyServer], debug: Any) -> None:
    """Nothing else is taken for either."""
    with pytest.raises(LocalProtocolError, match="debug"):
        kind(address, debug=debug)
