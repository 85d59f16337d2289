"""Checks of outcomes: a message, a value and a descriptor must be what their decoders promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.msgpack import Ext

from shmtransport.memory.descriptor import MAX_DIMENSIONS, TensorDescriptor
from shmtransport.protocol.messages import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    MAX_WINDOW,
    AnyMessage,
    Attach,
    Cancel,
    Failure,
    Goodbye,
    Hello,
    More,
    Offer,
    OneWayRequest,
    Part,
    Refused,
    Reply,
    Request,
    StreamRequest,
    Welcome,
)
from shmtransport.protocol.values import MAX_DEPTH

MOST_MESSAGE_BYTES = DEFAULT_MAX_MESSAGE_BYTES


def check_count(*numbers: int) -> None:
    for number in numbers:
        assert type(number) is int, f"a count is a {type(number).__name__}"
        assert 0 <= number < 2**63, f"a count is {number}"


def check_text(limit: int, *texts: str) -> None:
    for text in texts:
        assert type(text) is str, f"a text is a {type(text).__name__}"
        assert len(text) <= limit, f"a text has {len(text)} characters; the limit is {limit}"


def check_descriptors(descriptors: Sequence[TensorDescriptor]) -> None:
    assert type(descriptors) is tuple
    assert len(descriptors) <= MAX_TENSORS, f"{len(descriptors)} descriptors"
    for descriptor in descriptors:
        assert type(descriptor) is TensorDescriptor
        check_count(descriptor.offset, *descriptor.shape, descriptor.slot, descriptor.sequence)
        assert len(descriptor.shape) <= MAX_DIMENSIONS, f"{len(descriptor.shape)} dimensions"
        check_text(MOST_MESSAGE_BYTES, descriptor.dtype)


def check_message(message: AnyMessage) -> None:
    """Check that every field has the type and the limits that ``message`` promises."""
    match message:
        case Hello(request, reply, most, channel):
            check_count(request, reply, most)
            assert channel in ("zmq", "doorbell")
        case Refused(reason) | Goodbye(reason):
            check_text(4096, reason)
        case Offer(most):
            check_count(most)
        case Attach(segment) | Welcome(segment):
            check_text(MAX_NAME_CHARACTERS, segment)
        case _:
            _check_call(message)


def _check_call(message: AnyMessage) -> None:
    """The same for what is said of calls."""
    match message:
        case Request() | OneWayRequest() | StreamRequest():
            call_id, method, arguments, keywords, tensors = msgspec.structs.astuple(message)[:5]
            check_count(call_id)
            check_text(MAX_NAME_CHARACTERS, method)
            assert (type(arguments), type(keywords)) == (list, dict)
            check_text(MOST_MESSAGE_BYTES, *keywords)
            check_descriptors(tensors)
            if isinstance(message, StreamRequest):
                assert 1 <= message.window <= MAX_WINDOW
        case Reply(call_id, _, tensors) | Part(call_id, _, tensors):
            check_count(call_id)
            check_descriptors(tensors)
        case More(call_id, count):
            check_count(call_id)
            assert 1 <= count <= MAX_WINDOW
        case Cancel(call_id):
            check_count(call_id)
        case Failure(call_id, kind, type_name, text, lines):
            check_count(call_id)
            check_text(MAX_NAME_CHARACTERS, kind, type_name)
            check_text(4096, text, lines)
        case _:
            raise AssertionError(f"a {type(message).__name__} is no message")


_PLAIN = (type(None), bool, int, float, str, bytes)


def check_value(value: Any, depth: int = 0, *, snapshot: bool) -> None:
    """Check that ``pack`` would take a value, and that every array in it is read-only, unless it is a snapshot."""
    kind = type(value)
    if kind in _PLAIN or kind is torch.Tensor:
        return
    if kind is np.ndarray:
        assert snapshot or not value.flags.writeable, "a borrowed array can be written"
        return
    assert depth <= MAX_DEPTH, f"a value is nested more than {MAX_DEPTH} deep"
    if kind is dict:
        assert all(type(key) in (str, int) for key in value), "a key is neither str nor int"
        value = value.values()
    else:
        assert kind in (list, tuple), f"a value is a {kind.__name__}"
    for item in value:
        check_value(item, depth + 1, snapshot=snapshot)


def check_extensions(value: Any, tensors: int) -> None:
    """Check that what was unpacked has no extensions but those that name a tensor, and marks of tuples."""
    if type(value) is Ext:
        assert value.code in (1, 2), f"an extension of code {value.code} was taken for a tensor"
        assert len(value.data) == 2, f"{len(value.data)} bytes were taken for an index"
        assert int.from_bytes(value.data, "little") < tensors, "a tensor that is not there was found"
    elif type(value) is list:
        marked = bool(value) and type(value[0]) is Ext and value[0].code == 3
        for item in value[marked:]:
            check_extensions(item, tensors)
    elif type(value) is dict:
        for item in value.values():
            check_extensions(item, tensors)
