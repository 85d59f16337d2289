"""A peer's text appears in this side's errors and log as one harmless line, wherever it comes from."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import zmq

from shmtransport import Client, ConnectRefused, PeerDied, PeerProtocolError, RemoteError, TransportError
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.protocol.messages import ChannelKind, Failure, Goodbye, Refused, Reply, encode
from tests.support.helpers import Serve
from tests.support.protocols import ProtocolPair

EVIL = "\x1b[31mred\nFORGED line\u202e\u200b\x9b\u2028end"
SHOWN = r"\x1b[31mred FORGED line\u202e\u200b\x9b end"


def _is_harmless(text: str) -> bool:
    return text.isprintable() and "FORGED" in text


@pytest.mark.parametrize("kind", ["handler", "LocalProtocolError", "ArenaFull"])
def test_a_failures_text_and_class_name_are_shown_safely(kind: str) -> None:
    """Whatever class the client then raises."""
    pair = ProtocolPair()
    pending, call = pair.submit()
    pair.client.take_reply(encode(Failure(call.call_id, kind, EVIL[:60], EVIL)))
    with pytest.raises(TransportError) as caught:
        pending.take_result()
    assert SHOWN in str(caught.value)
    assert _is_harmless(str(caught.value))
    if isinstance(caught.value, RemoteError):
        assert _is_harmless(caught.value.message)
        assert _is_harmless(caught.value.type_name)


def test_a_goodbye_is_shown_safely() -> None:
    """The server's reason for ending the connection."""
    with pytest.raises(PeerDied) as caught:
        ProtocolPair().client.take_reply(encode(Goodbye(EVIL)))
    assert _is_harmless(str(caught.value))


def test_an_unknown_dtype_is_shown_safely() -> None:
    """In a descriptor, cut short."""
    descriptor = TensorDescriptor(0, (1,), EVIL, 0, 1)
    with pytest.raises(PeerProtocolError) as caught:
        descriptor.validate(4096, 16)
    assert _is_harmless(str(caught.value))


def test_a_refusal_is_shown_safely(fake_server: zmq.Socket[bytes], address: str) -> None:
    """What a server says to a client that it doesn't want."""
    import threading

    def refuse() -> None:
        identity, _ = fake_server.recv_multipart()
        fake_server.send_multipart((identity, encode(Refused(EVIL))))

    thread = threading.Thread(target=refuse)
    thread.start()
    with pytest.raises(ConnectRefused) as caught:
        Client(address)
    thread.join()
    assert _is_harmless(str(caught.value))


def test_keys_and_values_that_a_decoder_repeats_are_shown_safely() -> None:
    """A field's name in a message that is no valid one."""
    pair = ProtocolPair()
    data = bytearray(encode(Reply(0, {EVIL: 1}, ())))
    data[-1] ^= 0xFF
    with pytest.raises(PeerProtocolError) as caught:
        pair.client.take_reply(bytes(data))
    assert str(caught.value).isprintable()


def test_a_callers_text_forges_no_line_of_the_servers_log(
    serve: Serve, address: str, channel: ChannelKind, caplog: pytest.LogCaptureFixture
) -> None:
    """In a handler's error, in those that it came from, in notes, and in the name of a method that there is not."""

    def fail(text: str) -> None:
        try:
            raise KeyError(text)
        except KeyError as error:
            raised = ValueError(f"no dtype {text}")
            raised.__notes__ = [f"while reading {text}"]  # type: ignore[attr-defined]
            raise raised from error

    caplog.set_level(logging.DEBUG, "shmtransport")
    serve(fail=fail)
    with Client(address, channel=channel) as client:
        with pytest.raises(RemoteError) as caught:
            client.call("fail", EVIL)
        assert _is_harmless(str(caught.value))
        with pytest.raises(TransportError) as refused:
            client.call(EVIL, torch.ones(1))
        assert _is_harmless(str(refused.value))
    logged = [record.getMessage() for record in caplog.records]
    lines = [line for message in logged for line in message.split("\n")]
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.lstrip().startswith("FORGED")]
    assert any(line == f"ValueError: no dtype {SHOWN}" for line in lines)
    assert any(line == f"while reading {SHOWN}" for line in lines)
    assert any("Traceback (most recent call last)" in line for line in lines)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OSError(5, object()),
        lambda: ImportError("no", name=EVIL),
        lambda: OSError(5, EVIL),
        lambda: ValueError("\ud800"),
    ],
)
def test_every_error_of_a_handler_is_told(
    serve: Serve, address: str, channel: ChannelKind, make: Callable[[], Exception]
) -> None:
    """Odd texts in odd places end neither the call nor the server."""

    def fail() -> None:
        raise make()

    serve(fail=fail, echo=lambda x: x)
    with Client(address, channel=channel) as client:
        with pytest.raises(RemoteError) as caught:
            client.call("fail")
        assert str(caught.value).isprintable()
        assert client.call("echo", 1) == 1
