"""What a user passes is checked at home and in words, before anything is made or sent."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from shmtransport import AsyncClient, AsyncServer, Client, LocalProtocolError, Server, TransportError
from shmtransport.endpoints import options as checks

_SIZES = [64.5, 0, -1, True, "64", None, math.nan, math.inf, 2**63, 10**400, [1], 1j, b"1"]
_NO_NUMBERS = ["5", True, math.nan, -1, -0.5, [1], 1j, -math.inf, object()]


class _Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def _cases(names: tuple[str, ...], values: list[Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name in names for value in values]


_OF_CLIENTS = [
    *_cases(("arena_bytes",), _SIZES),
    *_cases(("reply_arena_bytes",), [value for value in _SIZES if value is not None]),
    *_cases(("max_message_bytes",), [*_SIZES, 10, 1023]),
    *_cases(("timeout_s", "connect_timeout_s"), _NO_NUMBERS),
    *_cases(("spin_us",), [*_NO_NUMBERS, math.inf]),
    *_cases(("snapshot", "prefault"), ["no", 1, 0.0, None]),
    ("channel", ["zmq"]),
    ("channel", None),
    ("arena_bytes", _Unshowable()),
]
_OF_SERVERS = [
    *_cases(("max_arena_bytes", "max_clients"), _SIZES),
    *_cases(("max_total_arena_bytes",), [value for value in _SIZES if value is not None]),
    *_cases(("max_message_bytes",), [*_SIZES, 10, 1023]),
    *_cases(("drain_timeout_s",), _NO_NUMBERS),
    *_cases(("claim_timeout_s",), [*_NO_NUMBERS, math.inf, None]),
    *_cases(("spin_us",), [*_NO_NUMBERS, math.inf]),
    *_cases(("prefault",), ["no", 1, 0.0, None]),
    *_cases(("channels",), ["zmq", (), None, ["pigeon"], 3, {"zmq": 1}]),
]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("name", "value"), _OF_CLIENTS, ids=_name)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_clients_odd_option_is_refused_by_name_at_home(
    address: str, kind: Callable[..., Any], name: str, value: Any
) -> None:
    """The error comes at once: no server runs here, so that connecting would take its whole time-out."""
    with pytest.raises(LocalProtocolError, match=name):
        kind(address, **{name: value})


@pytest.mark.parametrize(("name", "value"), _OF_SERVERS, ids=_name)
@pytest.mark.parametrize("kind", [Server, AsyncServer])
def test_a_servers_odd_option_is_refused_by_name_and_binds_nothing(
    address: str, kind: Callable[..., Any], name: str, value: Any
) -> None:
    """The address is free afterwards."""
    with pytest.raises(LocalProtocolError, match="channel" if name == "channels" else name):
        kind(address, **{name: value})
    Server(address).close()


@pytest.mark.parametrize("value", [0, 64.5, None, "many", True])
def test_an_asyncio_servers_own_option_is_checked(address: str, value: Any) -> None:
    """``max_calls_in_progress`` is a count as the others."""
    with pytest.raises(LocalProtocolError, match="max_calls_in_progress"):
        AsyncServer(address, max_calls_in_progress=value)
    Server(address).close()


@pytest.mark.parametrize("address", [None, 3, b"ipc:///tmp/x", "ipc:///tmp/a\0b"])
@pytest.mark.parametrize("kind", [Client, AsyncClient, Server, AsyncServer])
def test_what_is_no_address_is_refused(kind: Callable[..., Any], address: Any) -> None:
    """One of this package's errors, whatever it is."""
    with pytest.raises(TransportError):
        kind(address)


@pytest.mark.parametrize("value", [64e3, np.int64(64_000), np.float32(64_000), Fraction(64_000)])
def test_any_whole_number_is_a_size(serve: Callable[..., Server], address: str, value: Any) -> None:
    """Floats with an integral value and numpy's numbers are fine, on both sides."""
    serve({"max_arena_bytes": 2 * value, "max_clients": np.int8(2), "drain_timeout_s": np.float64(5)}, echo=lambda x: x)
    with Client(address, arena_bytes=value, max_message_bytes=value, timeout_s=np.float32(5)) as client:
        assert client.call("echo", 1) == 1


@pytest.mark.parametrize("limit", [None, math.inf, 10**30])
@pytest.mark.parametrize("channel", ["zmq", "doorbell"])
def test_no_limit_is_none_or_infinity(serve: Callable[..., Server], address: str, channel: Any, limit: Any) -> None:
    """For calls and for connecting, also where one thread waits for another's turn."""
    server = serve({"drain_timeout_s": limit}, echo=lambda x: x)
    with Client(address, channel=channel, timeout_s=limit, connect_timeout_s=limit) as client:
        assert client.call("echo", 1) == 1
        pending = [client.submit("echo", number) for number in range(3)]
        assert [one.result(math.inf) for one in reversed(pending)] == [2, 1, 0]
    assert server.statistics().calls == 4


@pytest.mark.parametrize("value", _NO_NUMBERS)
def test_a_time_for_one_result_is_checked_too(serve: Callable[..., Server], address: str, value: Any) -> None:
    """``result(timeout_s=…)``, which then may be asked again."""
    serve(echo=lambda x: x)
    with Client(address) as client:
        pending = client.submit("echo", 1)
        with pytest.raises(LocalProtocolError, match="timeout_s"):
            pending.result(value)
        assert pending.result() == 1


def test_a_refusal_is_one_short_line() -> None:
    """Whatever was passed."""
    for value in ("x" * 1000, _Unshowable(), 10**5000):
        with pytest.raises(LocalProtocolError) as caught:
            checks.whole("arena_bytes", value)
        assert len(str(caught.value)) < 200


def _defaults(made: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of the keyword arguments."""
    parameters = inspect.signature(made).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


@pytest.mark.usefixtures("default_arenas")
def test_both_clients_take_the_same_options() -> None:
    """Each by its name, with the defaults that the dataclass has, so that an editor can show them.

    The blocking client may have a GPU.
    """
    of_dataclass = {field.name: field.default for field in dataclasses.fields(checks.ClientOptions)}
    assert _defaults(Client) == {**_defaults(AsyncClient), "device": None}
    assert _defaults(Client) == {**of_dataclass, "reply_arena_bytes": None}


def test_both_servers_take_the_same_options() -> None:
    """The asyncio server has one more, and as many threads as asyncio itself."""
    of_server = _defaults(Server)
    assert {**of_server, "max_calls_in_progress": 256, "threads": None} == _defaults(AsyncServer)
    fields = {field.name for field in dataclasses.fields(checks.ServerOptions)}
    assert of_server.keys() == fields - {"total_source", "handshake_timeout_s"}
