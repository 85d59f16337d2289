"""The protocol after the handshake, without I/O: bytes to send, meaning of received bytes.

It knows call ids, the calls in flight and the tensors of a message, but nothing of sockets or memory maps. It uses
arenas through two small interfaces, ``Exporter`` and ``Importer``, which a test can implement.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import msgspec

from ..core import Counters, MessageCalls, decode_call
from ..core.codec import REPLY_TAG, REQUEST_TAG
from ..errors import (
    ArenaFull,
    Closed,
    LocalProtocolError,
    MessageTooLarge,
    PeerDied,
    PeerProtocolError,
    RemoteError,
    TensorTooLarge,
    TransportError,
)
from ..memory.descriptor import TensorDescriptor
from ..text import printable
from .in_flight import CallInFlight, StreamInFlight
from .messages import (
    MAX_NAME_CHARACTERS,
    Cancel,
    Failure,
    Goodbye,
    More,
    OneWayRequest,
    Part,
    Reply,
    Request,
    StreamRequest,
    shorten,
)
from .values import Codec, decode_unread

HANDLER = "handler"
_INTERRUPTED = "an interrupt came while this call's reply was being read"
_TRACEBACK_CHARACTERS = 4096  # its end, which names what failed
_RAISED_BY_NAME: dict[str, type[TransportError]] = {
    kind.__name__: kind for kind in (ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError)
}


class ClientProtocol:
    """The client's half of one connection: requests out, replies in, matched by call id."""

    def __init__(self, codec: Codec, counters: Counters) -> None:
        self._codec = codec
        self._counters = counters
        self.pending: dict[int, CallInFlight] = {}
        """The calls in flight, by their ids."""
        self.ids = itertools.count()
        """The ids of the calls to come."""
        self._messages: MessageCalls | None = None
        """What makes and takes messages in the compiled core."""
        if codec.is_plain:
            self._messages = MessageCalls(
                self.pending, self.ids, codec.loans, codec.borrows, counters, codec.max_message_bytes
            )

    def __len__(self) -> int:
        """Return how many calls are in flight."""
        return len(self.pending)

    def begin_call(self, call: CallInFlight, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bytes:
        """Return the bytes that start a call. The only thread-safe method of this class.

        Args:
            call: gets its id and these bytes.
            arguments: the positional arguments.
            keywords: the keyword arguments.

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: the call can't be sent; no block stays held.
        """
        if self._messages is not None and call.request() is Request:
            try:
                data: bytes | None = self._messages.encode(call, tuple(arguments), dict(keywords))
            except BaseException:  # also an interrupt once it is encoded
                self.take_back(call)
                raise
            if data is not None:
                return data
        method = call.method
        if not isinstance(method, str):
            raise LocalProtocolError(f"a method is named by a str, not by a {type(method).__name__}")
        if len(method) > MAX_NAME_CHARACTERS:
            raise LocalProtocolError(
                f"a method's name has {len(method)} characters; the limit is {MAX_NAME_CHARACTERS}"
            )
        call.call_id = call_id = next(self.ids)
        call.data = self._codec.encode_request(call_id, method, arguments, keywords, call.submitted, call.request())
        return call.data

    def expect_reply(self, call: CallInFlight) -> None:
        """Expect the reply to a request whose bytes are about to be sent."""
        self.pending[call.call_id] = call
        self._counters.count_in_flight(len(self.pending))

    def take_back(self, call: CallInFlight) -> None:
        """Undo a request whose bytes could not be sent."""
        self.pending.pop(call.call_id, None)
        data, call.data = call.data, None
        request = None if data is None else decode_unread(data)
        if isinstance(request, (Request, OneWayRequest, StreamRequest)):
            self._codec.withdraw(request.tensors)

    def take_reply(self, data: bytes) -> CallInFlight | None:
        """Read one message from the server, and return the call that it is an answer to, if that is in flight.

        Raises:
            PeerProtocolError: the message is invalid.
            PeerDied: the server ended the connection.
        """
        ended: CallInFlight | bool | None = None if self._messages is None else self._messages.take(data)
        if ended is None:
            return self._read_reply(data)
        if isinstance(ended, bool):  # the call was given up meanwhile
            return None
        ended.wake()
        return ended

    def _read_reply(self, data: bytes) -> CallInFlight | None:
        """Do what ``take_reply`` does, without the core's help."""
        started = perf_counter()
        try:
            taken = self._codec.take(REPLY_TAG, data)
        except MemoryError as error:
            return self._fail_unread(data, error)
        if taken is not None:
            return self._take_result(*taken, control_bytes=len(data), started=started)
        message = decode_unread(data)
        if isinstance(message, (Reply, Failure)):
            call = self.pending.pop(message.call_id, None)
            if call is not None:
                self._complete(call, message, len(data), started)
            else:
                if isinstance(message, Reply):
                    self._codec.discard(message.tensors)
                self._counters.count_received(len(data), 0, perf_counter() - started)
            return call
        if isinstance(message, Part):
            return self._take_part(message, len(data), started)
        if isinstance(message, Goodbye):
            raise PeerDied(f"the server ended the connection: {printable(message.reason)}")
        raise PeerProtocolError(f"the server sent a {type(message).__name__} where only replies are valid")

    def _fail_unread(self, data: bytes, error: MemoryError) -> CallInFlight | None:
        """End the call whose reply there was no memory to read; the others go on."""
        found = decode_call(data, TensorDescriptor)
        call = self.pending.pop(found[0], None) if found is not None else None
        if call is not None:
            call.fail(error)
            self._counters.count_call(perf_counter() - call.submitted, True)
        return call

    def _take_result(
        self, call_id: int, result: Any, tensors: int, tensor_bytes: int, *, control_bytes: int, started: float
    ) -> CallInFlight | None:
        """End a call with the result that the core has read; of one that was given up, the tensors are released."""
        call = self.pending.pop(call_id, None)
        try:
            self._counters.count_received(control_bytes, tensor_bytes, perf_counter() - started)
            if call is not None:
                call.succeed(result, has_tensors=tensors > 0)
                self._counters.count_call(perf_counter() - call.submitted)
        except BaseException:
            if call is not None and not call.ended:
                call.fail(Closed(_INTERRUPTED))
            raise
        return call

    def give_up(self, call: CallInFlight, error: TransportError) -> None:
        """End a call with an error; the tensors of a late reply are released when it comes."""
        self.pending.pop(call.call_id, None)
        call.fail(error)

    def fail_all(self, error: TransportError) -> list[CallInFlight]:
        """End every call in flight with the same error, and return these calls."""
        calls = list(self.pending.values())
        self.pending.clear()
        if calls:
            error = type(error)(*error.args)
            error.sent = True
        for call in calls:
            call.fail(error)
        return calls

    def _take_part(self, message: Part, control_bytes: int, started: float) -> CallInFlight | None:
        """Add a part to its stream; one that came after the stream was given up is released."""
        call = self.pending.get(message.call_id)
        if call is None:
            self._codec.discard(message.tensors)
            self._counters.count_received(control_bytes, 0, perf_counter() - started)
            return None
        if not isinstance(call, StreamInFlight):
            raise PeerProtocolError(f"the server sent a part of a stream for {call.method!r}, which is a single call")
        call.add(self._codec.result_of(message, control_bytes, started))
        return call

    def _complete(self, call: CallInFlight, message: Reply | Failure, control_bytes: int, started: float) -> None:
        failed = False
        if isinstance(message, Reply):
            try:
                call.succeed(self._codec.result_of(message, control_bytes, started), has_tensors=bool(message.tensors))
            except PeerProtocolError as error:
                call.fail(error)
                raise
            except Exception as error:  # noqa: BLE001 - such as no memory for a snapshot: fails this call alone
                failed = True
                call.fail(error)
            except BaseException:
                call.fail(Closed(_INTERRUPTED))
                raise
        else:
            failed = True
            call.fail(_raised(message))
            self._counters.count_received(control_bytes, 0, perf_counter() - started)
        self._counters.count_call(perf_counter() - call.submitted, failed)


def _raised(message: Failure) -> TransportError:
    kind, text = _RAISED_BY_NAME.get(message.error_name), printable(message.text)
    if kind is not None:
        return kind(f"on the server: {text}")
    return RemoteError(printable(message.type_name), text, printable(message.traceback, keep="\n"))


class Call(msgspec.Struct):
    """One call to handle; its tensors are borrowed views.

    ``is_answered`` is False for a one-way call. ``window`` is 0 for one reply, otherwise how many parts of a stream may
    be sent before the client asks for more.
    """

    call_id: int
    method: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    is_answered: bool = True
    window: int = 0


class ServerProtocol:
    """The server's half of one connection: requests in, replies out."""

    def __init__(self, codec: Codec, counters: Counters) -> None:
        self._codec = codec
        self._counters = counters

    def take_request(self, data: bytes) -> Call | More | Cancel | None:
        """Read one message from the client, and return it, a request as the call to handle, a goodbye as None.

        Raises:
            PeerProtocolError: the message is invalid.
        """
        started = perf_counter()
        taken = self._codec.take(REQUEST_TAG, data)
        if taken is not None:
            call_id, method, (arguments, keywords), _, tensor_bytes = taken
            self._counters.count_received(len(data), tensor_bytes, perf_counter() - started)
            return Call(call_id, method, arguments, keywords)
        message = decode_unread(data)
        if isinstance(message, (Request, OneWayRequest, StreamRequest)):
            arguments, keywords = self._codec.arguments_of(message, len(data), started)
            call = Call(message.call_id, message.method, arguments, keywords)
            if not isinstance(message, Request):
                call.is_answered = isinstance(message, StreamRequest)
                call.window = message.window if isinstance(message, StreamRequest) else 0
            return call
        self._counters.count_received(len(data), 0, perf_counter() - started)
        if isinstance(message, (More, Cancel)):
            return message
        if isinstance(message, Goodbye):
            return None
        raise PeerProtocolError(f"the client sent a {type(message).__name__} where only requests are valid")

    def encode_reply(self, call_id: int, result: Any) -> bytes:
        """Return the bytes of a call's result.

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: the result can't be sent.
        """
        return self._codec.encode_reply(call_id, result)

    def encode_part(self, call_id: int, result: Any) -> bytes:
        """Return the bytes of one of a stream's results; raises as ``encode_reply``."""
        return self._codec.encode_reply(call_id, result, Part)

    def encode_failure(self, call_id: int, error: BaseException, traceback: str = "") -> bytes:
        """Return the bytes of a call's exception: its class name and text.

        Never raises: what can't be sent is left out.

        Args:
            call_id: The call.
            error: What its handler raised.
            traceback: The error's traceback, for a client that is to see it. Default: none.
        """
        name = type(error).__name__
        error_name = name if name in _RAISED_BY_NAME and isinstance(error, TransportError) else HANDLER
        text = _text_of(error)
        for shown, lines in ((text, traceback[-_TRACEBACK_CHARACTERS:]), (text, "")):
            with contextlib.suppress(MessageTooLarge):
                return self._failure(call_id, error_name, name, shown, lines)
        return self._failure(call_id, error_name, "Exception", "its text is too long to be sent", "")

    def _failure(self, call_id: int, error_name: str, type_name: str, text: str, traceback: str) -> bytes:
        type_name = shorten(type_name, MAX_NAME_CHARACTERS)
        return self._codec.encode_failure(Failure(call_id, error_name, type_name, shorten(text), traceback))


def _text_of(error: BaseException) -> str:
    """Return an exception's text, without the file names that OSError and ImportError add."""
    try:
        if isinstance(error, OSError) and error.errno is not None:
            text = str(error.strerror or "operating-system error")
        elif isinstance(error, ImportError):
            text = f"can't import {error.name}"
        else:
            text = str(error)
        return text.encode(errors="backslashreplace").decode()
    except Exception:  # noqa: BLE001 - a handler's exception may fail at anything
        return "its text can't be shown"
