"""The protocol after the handshake, without I/O: which bytes to send, and what received bytes mean.

It knows correlation ids, pending replies and which tensors a message carries; it knows nothing of sockets or memory
maps. Arenas come in through two small interfaces, so that a test can stand in for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from .descriptor import TensorDescriptor
from .errors import (
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
from .forks import BoundToProcess
from .message import (
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    AnyMessage,
    Failure,
    Goodbye,
    Reply,
    Request,
    decode,
    encode,
    pack,
    shorten,
    unpack,
)
from .statistics import Counters
from .text import printable
from .uncompiled import uncompiled

HANDLER = "handler"
_ARGUMENT_DEPTH = 2  # an argument lies in the list of arguments, which lies in the message
_RAISED_BY_KIND: dict[str, type[TransportError]] = {
    kind.__name__: kind for kind in (ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError)
}


class Exporter(Protocol):
    """The side of a send arena that the protocol uses."""

    copies: dict[int, int]

    def export(self, tensor: torch.Tensor) -> TensorDescriptor: ...

    def export_array(self, array: np.ndarray[Any, Any]) -> TensorDescriptor: ...

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None: ...


class Importer(Protocol):
    """The side of a receive arena that the protocol uses."""

    def borrow(self, descriptor: TensorDescriptor) -> torch.Tensor: ...


class _Parcel(list[TensorDescriptor]):
    """The tensors of one message that is being made."""

    __slots__ = ("_exporter", "nbytes")

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self.nbytes = 0

    def add(self, tensor: torch.Tensor | np.ndarray[Any, Any]) -> int:
        """Describe a tensor to the peer; its index in the message."""
        index = len(self)
        if index == MAX_TENSORS:
            raise LocalProtocolError(f"one message carries {MAX_TENSORS} tensors at most")
        if isinstance(tensor, torch.Tensor):
            self.append(self._exporter.export(tensor))
        else:
            self.append(self._exporter.export_array(tensor))
        self.nbytes += tensor.nbytes
        return index


class Codec:
    """Turns values with tensors into messages and back, for either side of one connection.

    ``request`` may be used by several threads at once.
    """

    def __init__(
        self,
        exporter: Exporter,
        importer: Importer,
        counters: Counters,
        max_message_bytes: int,
        *,
        snapshot: bool = False,
    ) -> None:
        self._exporter = exporter
        self._borrow = importer.borrow
        self._counters = counters
        self._max_message_bytes = max_message_bytes
        self._snapshot = snapshot

    def request(
        self, call_id: int, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any], started: float
    ) -> tuple[bytes, Sequence[TensorDescriptor]]:
        """The bytes of a request and what it holds; on any error no block stays held."""
        parcel = _Parcel(self._exporter)
        try:
            add = parcel.add
            packed = [pack(argument, add, _ARGUMENT_DEPTH) for argument in arguments]
            named = {name: pack(argument, add, _ARGUMENT_DEPTH) for name, argument in keywords.items()}
            data = encode(Request(call_id, method, packed, named, tuple(parcel)), self._max_message_bytes)
            self._count_sent(data, parcel, started)
        except BaseException:
            self._exporter.withdraw(parcel)
            raise
        return data, parcel

    def reply(self, call_id: int, result: Any) -> bytes:
        """The bytes of a reply; on any error no block stays held."""
        started = perf_counter()
        parcel = _Parcel(self._exporter)
        try:
            data = encode(Reply(call_id, pack(result, parcel.add), tuple(parcel)), self._max_message_bytes)
            self._count_sent(data, parcel, started)
        except BaseException:
            self._exporter.withdraw(parcel)
            raise
        return data

    def failure(self, failure: Failure) -> bytes:
        """The bytes of a failure."""
        data = encode(failure, self._max_message_bytes)
        self._counters.control_bytes_sent += len(data)
        return data

    def decode(self, data: bytes) -> AnyMessage:
        self._counters.control_bytes_received += len(data)
        return decode(data)

    def borrow(self, descriptors: Sequence[TensorDescriptor]) -> list[torch.Tensor]:
        """A received message's tensors: borrowed views, or private copies for a snapshot."""
        tensors = []
        for descriptor in descriptors:
            tensor = self._borrow(descriptor)
            self._counters.tensor_bytes_received += tensor.nbytes
            tensors.append(tensor)
        if self._snapshot:
            return [tensor.clone() for tensor in tensors]
        return tensors

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """Take back tensors of a message that was not sent."""
        self._exporter.withdraw(descriptors)

    def discard(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """Release tensors that nobody wants any more."""
        for descriptor in descriptors:
            self._borrow(descriptor)

    def _count_sent(self, data: bytes, parcel: _Parcel, started: float) -> None:
        counters = self._counters
        if parcel:
            counters.tensors_sent += len(parcel)
            counters.tensor_bytes_sent += parcel.nbytes
            copies = self._exporter.copies
            if copies:
                for descriptor in parcel:
                    nbytes = copies.pop(descriptor.sequence, 0)
                    counters.tensors_copied += nbytes > 0
                    counters.bytes_copied += nbytes
        counters.control_bytes_sent += len(data)
        counters.serialize_seconds += perf_counter() - started


@uncompiled
class PendingReply(BoundToProcess):
    """The client's handle on a call in flight; made by ``Client.submit``."""

    call_id = -1
    done = False
    tensors: Sequence[TensorDescriptor] = ()
    _result: Any = None
    _error: BaseException | None = None

    def __init__(self, method: str, wait: Callable[[PendingReply, float | None], None]) -> None:
        self.method = method
        self.submitted = perf_counter()
        self._wait = wait

    def result(self, timeout_s: float | None = None) -> Any:
        """The call's result; waits for it up to ``timeout_s`` seconds (default: the client's).

        Raises:
            CallTimeout: no reply in time; a late one is thrown away.
            RemoteError: the handler raised.
            PeerDied, PeerProtocolError, Closed: the connection ended first.
        """
        if not self.done:
            self._wait(self, timeout_s)
        if self._error is not None:
            try:
                raise self._error.with_traceback(None)  # it may have been raised before, for other calls too
            finally:
                del self  # the error's traceback holds this frame: a cycle, and with it the caller's arguments
        return self._result

    def resolve(self, result: Any) -> None:
        self._result = result
        self.done = True

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.done = True


class ClientProtocol:
    """The client's half: requests out, replies in, matched by correlation id."""

    def __init__(self, codec: Codec, counters: Counters) -> None:
        self._codec = codec
        self._counters = counters
        self._pending: dict[int, PendingReply] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        """How many calls are in flight."""
        return len(self._pending)

    def request(self, pending: PendingReply, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bytes:
        """The bytes that start a call; may be used by several threads at once, other than all else here.

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: nothing is held for the call.
        """
        method = pending.method
        if not isinstance(method, str):
            raise LocalProtocolError(f"a method is named by a str, not by a {type(method).__name__}")
        if len(method) > MAX_NAME_CHARACTERS:
            raise LocalProtocolError(
                f"a method's name has {len(method)} characters; the limit is {MAX_NAME_CHARACTERS}"
            )
        pending.call_id = call_id = next(self._ids)
        data, pending.tensors = self._codec.request(call_id, method, arguments, keywords, pending.submitted)
        return data

    def start(self, pending: PendingReply) -> None:
        """The request's bytes are about to be sent: expect the reply."""
        self._pending[pending.call_id] = pending
        if len(self._pending) > self._counters.in_flight_peak:
            self._counters.in_flight_peak = len(self._pending)

    def take_back(self, pending: PendingReply) -> None:
        """Undo a request whose bytes could not be sent."""
        self._pending.pop(pending.call_id, None)
        self._codec.withdraw(pending.tensors)

    def receive(self, data: bytes) -> PendingReply | None:
        """Take one message from the server; the call that it completed, if any.

        Raises:
            PeerProtocolError: the message is invalid.
            PeerDied: the server ended the connection.
        """
        started = perf_counter()
        message = self._codec.decode(data)
        if isinstance(message, (Reply, Failure)):
            pending = self._pending.pop(message.call_id, None)
            if pending is not None:
                self._complete(pending, message, started)
            elif isinstance(message, Reply):
                self._codec.discard(message.tensors)
            return pending
        if isinstance(message, Goodbye):
            raise PeerDied(f"the server ended the connection: {printable(message.reason)}")
        raise PeerProtocolError(f"the server sent a {type(message).__name__} where only replies are valid")

    def give_up(self, pending: PendingReply, error: TransportError) -> None:
        """End a call with an error; when its reply comes after all, what it holds is released."""
        self._pending.pop(pending.call_id, None)
        pending.fail(error)

    def fail_all(self, error: TransportError) -> None:
        """End every call in flight with the same error."""
        pending = list(self._pending.values())
        self._pending.clear()
        for call in pending:
            call.fail(error)

    def _complete(self, pending: PendingReply, message: Reply | Failure, started: float) -> None:
        counters = self._counters
        if isinstance(message, Reply):
            try:
                pending.resolve(unpack(message.result, self._codec.borrow(message.tensors)))
            except PeerProtocolError as error:
                pending.fail(error)
                raise
            except Exception as error:  # noqa: BLE001 - no memory for a snapshot, say: this call's failure, no other's
                counters.failures += 1
                pending.fail(error)
            except BaseException:
                pending.fail(Closed("an interrupt came while this call's reply was being read"))
                raise
        else:
            counters.failures += 1
            pending.fail(_raised(message))
        ended = perf_counter()
        counters.deserialize_seconds += ended - started
        counters.count_call(ended - pending.submitted)


def _raised(message: Failure) -> TransportError:
    kind, text = _RAISED_BY_KIND.get(message.kind), printable(message.text)
    return RemoteError(printable(message.type_name), text) if kind is None else kind(f"on the server: {text}")


class Call(msgspec.Struct):
    """One call to be handled: the tensors in it are borrowed views."""

    call_id: int
    method: str
    arguments: list[Any]
    keywords: dict[str, Any]


class ServerProtocol:
    """The server's half of one connection: requests in, replies out."""

    def __init__(self, codec: Codec, counters: Counters) -> None:
        self._codec = codec
        self._counters = counters

    def receive(self, data: bytes) -> Call | None:
        """Take one message from the client: a call to handle, or None if the client said goodbye.

        Raises:
            PeerProtocolError: the message is invalid.
        """
        started = perf_counter()
        message = self._codec.decode(data)
        if not isinstance(message, Request):
            if isinstance(message, Goodbye):
                return None
            raise PeerProtocolError(f"the client sent a {type(message).__name__} where only requests are valid")
        tensors = self._codec.borrow(message.tensors)
        arguments = [unpack(argument, tensors, _ARGUMENT_DEPTH) for argument in message.arguments]
        keywords = {name: unpack(argument, tensors, _ARGUMENT_DEPTH) for name, argument in message.keywords.items()}
        self._counters.deserialize_seconds += perf_counter() - started
        return Call(message.call_id, message.method, arguments, keywords)

    def reply(self, call_id: int, result: Any) -> bytes:
        """The bytes of a call's result.

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: the result can't be sent.
        """
        return self._codec.reply(call_id, result)

    def failure(self, call_id: int, error: BaseException) -> bytes:
        """The bytes of a call's exception: its class name and text, without traceback or file paths; never fails."""
        name = type(error).__name__
        kind = name if name in _RAISED_BY_KIND and isinstance(error, TransportError) else HANDLER
        try:
            return self._failure(call_id, kind, name, _text_of(error))
        except MessageTooLarge:
            return self._failure(call_id, kind, "Exception", "its text is too long to be sent")

    def _failure(self, call_id: int, kind: str, name: str, text: str) -> bytes:
        return self._codec.failure(Failure(call_id, kind, shorten(name, MAX_NAME_CHARACTERS), shorten(text)))


def _text_of(error: BaseException) -> str:
    """An exception's own words; without the file names that Python adds to those of the system and of imports."""
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
