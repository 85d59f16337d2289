"""Turns values with tensors, a call's arguments and its result, into messages and back.

Plain values (None, bool, int, float, str, bytes, and lists, tuples and dicts of them) travel as MessagePack. A tensor
travels as an extension that holds its index in the message's descriptor list; a tuple as a list that starts with a
marker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.utils.dlpack
from msgspec.msgpack import Ext

from ..core import Counters, MessageCalls, decode_call, decode_values, encode_reply, encode_request, take_call
from ..core.codec import ARGUMENT_DEPTH, EXT_ARRAY, EXT_TENSOR, EXT_TUPLE, MAX_DEPTH, REPLY_TAG, REQUEST_TAG
from ..core.refusals import bad_key, changed_size, nested_too_deep
from ..errors import LocalProtocolError, PeerProtocolError
from ..memory.descriptor import TensorDescriptor
from ..memory.dtypes import BY_NAME
from ..memory.plain import is_on_device, of_a_library
from ..memory.views import array_over
from .messages import (
    MAX_TENSORS,
    UNSENDABLE,
    AnyMessage,
    AnyRequest,
    Failure,
    Part,
    Reply,
    Request,
    check_size,
    decode,
    encode,
    unsendable,
)

_TUPLE_MARKER = Ext(EXT_TUPLE, b"")
_INDEX = {index.to_bytes(2, "little"): index for index in range(MAX_TENSORS)}
_TENSOR_EXTS = tuple(Ext(EXT_TENSOR, data) for data in _INDEX)
_PLAIN_TYPES = frozenset({type(None), bool, int, float, str, bytes})
_KEY_TYPES = frozenset({str, int})


class Exporter(Protocol):
    """What the protocol uses of a send arena."""

    copies: dict[int, int]
    loans: Any
    """What the core may export tensors of by itself; None if there is nothing."""

    def export(self, tensor: torch.Tensor) -> TensorDescriptor: ...

    def export_array(self, array: np.ndarray[Any, Any]) -> TensorDescriptor: ...

    def export_foreign(self, tensor: Any) -> TensorDescriptor: ...

    def complete(self, descriptors: Sequence[TensorDescriptor]) -> None: ...

    def finish(self) -> None: ...

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None: ...


class Importer(Protocol):
    """What the protocol uses of a receive arena."""

    borrows: Any
    """What the core may borrow tensors from by itself; None if there is nothing."""

    def borrow(self, descriptor: TensorDescriptor) -> torch.Tensor: ...

    def check_whole(self) -> None: ...


class _Unread(NamedTuple):
    """The values of a received message that are still bytes of it."""

    data: bytes
    start: int


def decode_unread(data: bytes) -> AnyMessage:
    """Return the typed message in a peer's bytes; the values of a request or reply are for ``Codec`` to read.

    Raises:
        PeerProtocolError: the bytes are of another format version, or no valid message.
    """
    call = decode_call(data, TensorDescriptor)
    if call is None:
        return decode(data)
    call_id, method, descriptors, start = call
    values: Any = _Unread(data, start)
    return Reply(call_id, values, descriptors) if method is None else Request(call_id, method, values, {}, descriptors)


class _Outbox(list[TensorDescriptor]):
    """The tensors of one message in the making."""

    __slots__ = ("_exporter", "copied_bytes", "copies", "nbytes")

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self.nbytes = self.copies = self.copied_bytes = 0

    def pack(self, value: Any, depth: int) -> Any:
        """Pack a value at a depth, and export its tensors."""
        return pack(value, self.add, depth)

    def add(self, tensor: Any) -> int:
        """Export a tensor, an array, or another library's tensor on a GPU; return its index in the message."""
        index = len(self)
        if index == MAX_TENSORS:
            raise LocalProtocolError(f"one message carries {MAX_TENSORS} tensors at most")
        if isinstance(tensor, torch.Tensor):
            self.append(self._exporter.export(tensor))
        elif isinstance(tensor, np.ndarray):
            self.append(self._exporter.export_array(tensor))
        else:
            self.append(descriptor := self._exporter.export_foreign(tensor))
            self.nbytes += prod(descriptor.shape) * BY_NAME[descriptor.dtype].itemsize
            return index
        self.nbytes += tensor.nbytes
        return index

    def add_exported(self, nbytes: int, copies: int, copied_bytes: int) -> None:
        """Count what the core has exported by itself."""
        self.nbytes += nbytes
        self.copies += copies
        self.copied_bytes += copied_bytes


class Codec:
    """Turns values with tensors into messages and back, for either side of one connection.

    Several threads may call ``encode_request`` at once.

    Args:
        exporter: the arena that tensors are sent from.
        importer: the arena that tensors are received from.
        counters: the statistics to count in.
        max_message_bytes: the most bytes of one message.
        snapshot: give received tensors as private copies. Default: as borrowed views.
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
        self.loans = exporter.loans
        self.borrows = importer.borrows
        self._borrow = importer.borrow
        self._check_whole = importer.check_whole
        self._counters = counters
        self.max_message_bytes = max_message_bytes
        self.snapshot = snapshot
        self._to_array = own_array if snapshot else read_only_array

    @property
    def is_plain(self) -> bool:
        """Whether the compiled core may make and read messages by itself."""
        return MessageCalls is not None and self.loans is not None and self.loans.knows_tensors and not self.snapshot

    def encode_request(
        self,
        call_id: int,
        method: str,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        started: float,
        kind: Callable[..., AnyRequest] = Request,
    ) -> bytes:
        """Return the bytes of a request.

        Tensors on a GPU are complete then. On any error no block stays held.

        Args:
            call_id: names the call in its reply.
            method: the name of the handler.
            arguments: the positional arguments.
            keywords: the keyword arguments.
            started: when the call began, by ``perf_counter``.
            kind: makes the message. Default: a request that one reply answers.

        Raises:
            ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError: the arguments can't be sent.
        """
        outbox = _Outbox(self._exporter)
        try:
            if kind is Request:
                data, nbytes, copies, copied_bytes = encode_request(
                    call_id, method, tuple(arguments), dict(keywords), outbox.pack, outbox, self.loans
                )
                if nbytes:
                    outbox.add_exported(nbytes, copies, copied_bytes)
                check_size(data, self.max_message_bytes)
            else:
                packed = [outbox.pack(argument, ARGUMENT_DEPTH) for argument in arguments]
                named = {name: outbox.pack(argument, ARGUMENT_DEPTH) for name, argument in keywords.items()}
                data = encode(kind(call_id, method, packed, named, tuple(outbox)), self.max_message_bytes)
            self._exporter.finish()
            self._count_sent(data, outbox, started)
        except BaseException as error:
            self._exporter.withdraw(outbox)
            if isinstance(error, UNSENDABLE):
                raise unsendable(error) from error
            raise
        return data

    def encode_reply(self, call_id: int, result: Any, kind: type[Reply | Part] = Reply) -> bytes:
        """Return the bytes of a reply, or of a part of a stream; on any error no block stays held."""
        started = perf_counter()
        outbox = _Outbox(self._exporter)
        try:
            if kind is Reply:
                data, nbytes, copies, copied_bytes = encode_reply(call_id, result, outbox.pack, outbox, self.loans)
                if nbytes:
                    outbox.add_exported(nbytes, copies, copied_bytes)
                check_size(data, self.max_message_bytes)
            else:
                data = encode(kind(call_id, outbox.pack(result, 0), tuple(outbox)), self.max_message_bytes)
            self._exporter.complete(outbox)
            self._count_sent(data, outbox, started)
        except BaseException as error:
            self._exporter.withdraw(outbox)
            if isinstance(error, UNSENDABLE):
                raise unsendable(error) from error
            raise
        return data

    def encode_failure(self, failure: Failure) -> bytes:
        """Return the bytes of a failure."""
        data = encode(failure, self.max_message_bytes)
        self._counters.count_sent(len(data))
        return data

    def take(self, tag: int, data: bytes) -> tuple[Any, ...] | None:
        """Return a received request or reply as the core reads it, see ``core.codec.take_call``, or None.

        Raises:
            PeerProtocolError: the peer has cut its segment short.
        """
        taken = None if self.snapshot else take_call(data, tag, self.borrows)
        if taken is not None and taken[-1]:
            self._check_whole()
        return taken

    def result_of(self, reply: Reply | Part, control_bytes: int, started: float) -> Any:
        """Return the result in a received reply, or part of a stream, with its tensors.

        Args:
            reply: the decoded message.
            control_bytes: its size in bytes.
            started: when decoding it began, by ``perf_counter``.

        Raises:
            PeerProtocolError: a descriptor or a value that the other side never makes.
        """
        tensors, tensor_bytes = self._borrow_all(reply.tensors)
        result: Any
        if type(reply.result) is _Unread:
            result = decode_values(REPLY_TAG, *reply.result, tensors, self._to_array)
        else:
            result = unpack(reply.result, tensors, 0, self._to_array)
        self._counters.count_received(control_bytes, tensor_bytes, perf_counter() - started)
        return result

    def arguments_of(
        self, request: AnyRequest, control_bytes: int, started: float
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a received request's arguments and keyword arguments with their tensors.

        Args:
            request: the decoded message.
            control_bytes: its size in bytes.
            started: when decoding it began, by ``perf_counter``.

        Raises:
            PeerProtocolError: a descriptor or a value that the other side never makes.
        """
        tensors, tensor_bytes = self._borrow_all(request.tensors)
        unread: Any = request.arguments
        if type(unread) is _Unread:
            arguments, keywords = decode_values(REQUEST_TAG, *unread, tensors, self._to_array)
        else:
            arguments = tuple([unpack(one, tensors, ARGUMENT_DEPTH, self._to_array) for one in request.arguments])
            keywords = {
                name: unpack(one, tensors, ARGUMENT_DEPTH, self._to_array) for name, one in request.keywords.items()
            }
        self._counters.count_received(control_bytes, tensor_bytes, perf_counter() - started)
        return arguments, keywords

    def _borrow_all(self, descriptors: Sequence[TensorDescriptor]) -> tuple[tuple[torch.Tensor, ...], int]:
        """Return a message's tensors, as borrowed views or snapshots, and their size in bytes."""
        if not descriptors:
            return (), 0
        tensors = tuple([self._borrow(descriptor) for descriptor in descriptors])
        nbytes = sum([tensor.nbytes for tensor in tensors])
        if self.snapshot:
            tensors = tuple([tensor.clone() for tensor in tensors])
        self._check_whole()
        return tensors, nbytes

    def withdraw(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """Take back the tensors of a message that was not sent."""
        self._exporter.withdraw(descriptors)

    def discard(self, descriptors: Sequence[TensorDescriptor]) -> None:
        """Release the tensors of a message that no caller waits for."""
        for descriptor in descriptors:
            self._borrow(descriptor)

    def _count_sent(self, data: bytes, outbox: _Outbox, started: float) -> None:
        copies = self._exporter.copies
        if copies:
            for descriptor in outbox:
                nbytes = copies.pop(descriptor.sequence, 0)
                outbox.add_exported(0, nbytes > 0, nbytes)
        self._counters.count_sent(
            len(data), perf_counter() - started, len(outbox), outbox.nbytes, outbox.copies, outbox.copied_bytes
        )


def pack(value: Any, export: Callable[[Any], int], depth: int = 0) -> Any:
    """Return a value ready to encode, with an extension in place of each tensor.

    Args:
        value: what is to be sent.
        export: exports a tensor, and returns the index of its descriptor in the message.
        depth: how deep the value is nested already. Default: 0.

    Raises:
        LocalProtocolError: a value's type can't be sent, or it is nested deeper than ``MAX_DEPTH``.
    """
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if isinstance(value, torch.Tensor):
        return _TENSOR_EXTS[export(value)]
    if isinstance(value, np.ndarray):
        index = export(value)
        # An array of a dtype that numpy itself lacks, such as those of ml_dtypes, arrives as a tensor.
        return _TENSOR_EXTS[index] if of_a_library(value) else Ext(EXT_ARRAY, index.to_bytes(2, "little"))
    if depth >= MAX_DEPTH:
        raise nested_too_deep(MAX_DEPTH)
    if isinstance(value, (list, tuple)):
        items = [pack(item, export, depth + 1) for item in value]
        return [_TUPLE_MARKER, *items] if isinstance(value, tuple) else items
    if isinstance(value, dict):
        packed = {}
        for key, item in value.items():
            if type(key) not in _KEY_TYPES:
                raise bad_key(type(key))
            packed[key] = pack(item, export, depth + 1)
        if kind is dict and len(packed) != len(value):  # Python notices another size, but not every other key
            raise changed_size()
        return packed
    return _pack_foreign(value, export)


def _pack_foreign(value: Any, export: Callable[[Any], int]) -> Any:
    """Pack a value of another library's type: a numpy scalar, or an array with ``__dlpack__``."""
    kind = type(value)
    if isinstance(value, np.generic) and value.dtype.kind not in "mM" and type(value.item()) in _PLAIN_TYPES:
        return value.item()
    if is_on_device(value) and not torch.cuda.is_available():
        return _TENSOR_EXTS[export(value)]
    if hasattr(kind, "__dlpack__"):
        return _TENSOR_EXTS[export(_from_dlpack(value))]
    raise LocalProtocolError(
        f"an object of type {kind.__name__} can't be sent; tensors, numpy arrays, whatever has __dlpack__, None, bool, "
        "int, float, str, bytes, and lists, tuples and dicts of these can"
    )


def _from_dlpack(value: Any) -> torch.Tensor:
    try:
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
        return tensor
    except Exception as error:  # another library's code may raise anything
        raise LocalProtocolError(f"a {type(value).__name__} can't be sent: its __dlpack__ failed: {error}") from error


def unpack(
    value: Any, tensors: Sequence[torch.Tensor], depth: int = 0, to_array: Callable[[torch.Tensor], Any] | None = None
) -> Any:
    """Undo ``pack``: return a peer's decoded value with its tensors.

    Args:
        value: the decoded value.
        tensors: the message's tensors, by index.
        depth: how deep the value is nested already. Default: 0.
        to_array: makes the array of a tensor that was sent as one. Default: a view of it, read-only.

    Raises:
        PeerProtocolError: an extension, index, type or depth that ``pack`` never makes.
    """
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if depth > MAX_DEPTH:
        raise PeerProtocolError(f"the peer sent values nested more than {MAX_DEPTH} deep")
    if kind is Ext:
        return _unpack_tensor(value, tensors, to_array or read_only_array)
    if kind is list:
        if value and type(value[0]) is Ext and value[0].code == EXT_TUPLE:
            return tuple([unpack(item, tensors, depth + 1, to_array) for item in value[1:]])
        return [unpack(item, tensors, depth + 1, to_array) for item in value]
    if kind is dict:
        if not all(type(key) in _KEY_TYPES for key in value):
            raise PeerProtocolError("the peer sent a dict key that is neither str nor int")
        return {key: unpack(item, tensors, depth + 1, to_array) for key, item in value.items()}
    raise PeerProtocolError(f"the peer sent a value of type {kind.__name__}")


def _unpack_tensor(extension: Ext, tensors: Sequence[torch.Tensor], to_array: Callable[[torch.Tensor], Any]) -> Any:
    code = extension.code
    index = _INDEX.get(extension.data, MAX_TENSORS)  # type: ignore[call-overload]  # decoded data is bytes
    if (code != EXT_TENSOR and code != EXT_ARRAY) or index >= len(tensors):
        raise PeerProtocolError(f"the peer sent an extension of code {code} that names no tensor")
    tensor = tensors[index]
    if code == EXT_TENSOR:
        return tensor
    return to_array(tensor)


def read_only_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a borrowed tensor as the array that it was sent as; read-only, since it is the peer's memory."""
    try:
        return array_over(tensor)
    except TypeError:
        raise _no_array(tensor) from None


def own_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a snapshot as the array that it was sent as."""
    try:
        array: np.ndarray[Any, Any] = tensor.numpy()
    except TypeError:
        raise _no_array(tensor) from None
    return array


def _no_array(tensor: torch.Tensor) -> PeerProtocolError:
    return PeerProtocolError(f"the peer sent a numpy array of {tensor.dtype}, which numpy doesn't have")
