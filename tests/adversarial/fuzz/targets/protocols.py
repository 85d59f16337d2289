"""The two halves of the protocol, each attacked by the other."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Sequence
from random import Random
from typing import ClassVar

import msgspec
import torch

from shmtransport.errors import (
    ArenaFull,
    LocalProtocolError,
    MessageTooLarge,
    PeerDied,
    PeerProtocolError,
    RemoteError,
    TensorTooLarge,
)
from shmtransport.memory.descriptor import TensorDescriptor
from shmtransport.memory.dtypes import BY_NAME
from shmtransport.protocol.calls import Call
from shmtransport.protocol.in_flight import CallInFlight, StreamInFlight
from shmtransport.protocol.messages import MAX_NAME_CHARACTERS, MAX_WINDOW
from tests.support.protocols import Direction, ProtocolPair

from .. import mutations
from ..rule import Target
from .outcomes import MOST_MESSAGE_BYTES, check_count, check_message, check_text, check_value
from .samples import ENCODED_REPLIES, ENCODED_REQUESTS


class _Exchange(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The messages that a peer sends, in order; ``snapshot`` is the client's option."""

    snapshot: bool
    messages: list[bytes]


_exchanges = msgspec.msgpack.Decoder(_Exchange)


_WINDOW = 2
_SENT = ("float32", "bfloat16", "bool", "int64")


def _send_tensors(direction: Direction) -> weakref.WeakSet[torch.Tensor]:
    """Send tensors of the sequences 1, 2, … ; the set will be of the views that their receiver holds."""
    views: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    borrow = direction.borrow

    def watched(descriptor: TensorDescriptor) -> torch.Tensor:
        view = borrow(descriptor)
        views.add(view)
        return view

    for name in _SENT:
        direction.export(torch.zeros(2, dtype=BY_NAME[name].torch))
    direction.borrow = watched  # type: ignore[method-assign]
    return views


class _Protocol(Target):
    """One half of the protocol, over dicts in place of arenas; the input is what the other half sends."""

    valid: ClassVar[Sequence[bytes]]
    tags: ClassVar[Sequence[int]]

    def __init__(self) -> None:
        self._views: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def generate(self, random: Random) -> bytes:
        messages = []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            kind = random.random()
            if kind < 0.1:
                messages.append(random.choice(self.valid))
            elif kind < 0.5:
                messages.append(mutations.mutate(random, self.valid))
            else:
                messages.append(
                    mutations.message(random, self.tags if random.random() < 0.95 else range(14), len(_SENT))
                )
        return msgspec.msgpack.encode(_Exchange(random.random() < 0.3, messages))

    def carrying(self, message: bytes) -> bytes:
        return msgspec.msgpack.encode(_Exchange(False, [message]))

    def leftovers(self) -> str:
        for generation in (1, 2):
            if self._views:  # an error that a call keeps has a traceback, whose frames have the call and its tensors
                gc.collect(generation)
        return f"{len(self._views)} borrows stay held" if self._views else ""


class ClientReceiving(_Protocol):
    """``ClientProtocol.take_reply`` with three calls and a stream in flight: each ends at most once, with a value or
    with an error, and no more parts come than were asked for.

    ``PeerDied`` is the other outcome: the server said goodbye.
    """

    name = "client"
    refusals = (PeerProtocolError, PeerDied)
    valid = ENCODED_REPLIES
    tags = (5, 7, 7, 7, 8, 11)

    def check(self, data: bytes) -> None:
        exchange = _exchanges.decode(data)
        pair = ProtocolPair(snapshot=exchange.snapshot)
        calls: list[CallInFlight] = [pair.request()[0] for _ in range(3)]
        stream = StreamInFlight("method", _WINDOW)
        pair.client.begin_call(stream, (), {})
        pair.client.expect_reply(stream)
        calls.append(stream)
        self._views = _send_tensors(pair.down)
        ended: set[int] = set()
        for message in exchange.messages:
            try:
                call = pair.client.take_reply(message)
            except PeerProtocolError:
                ended |= {call.call_id for call in calls if call.ended}
                assert len(pair.client) == len(calls) - len(ended), "calls in flight were miscounted"
                raise
            if call is not None:
                assert call.call_id not in ended, "a call ended twice"
                if call.ended:
                    ended.add(call.call_id)
                self._look_at(call, exchange.snapshot)
            assert [call.call_id for call in calls if call.ended] == sorted(ended), "another call ended"
            assert len(pair.client) == len(calls) - len(ended), "calls in flight were miscounted"
            assert not (exchange.snapshot and self._views), "a snapshot keeps its tensor borrowed"

    def _look_at(self, call: CallInFlight, snapshot: bool) -> None:
        assert call.ready
        assert call.ended or isinstance(call, StreamInFlight)
        errors = (RemoteError, ArenaFull, TensorTooLarge, MessageTooLarge, LocalProtocolError, StopIteration)
        with contextlib.suppress(*errors):
            part = call.take_part() if isinstance(call, StreamInFlight) else call.take_result()
            check_value(part, snapshot=snapshot)


class ServerReceiving(_Protocol):
    """``ServerProtocol.take_request``: a call, what is said of one, or None for a goodbye."""

    name = "server"
    valid = ENCODED_REQUESTS
    tags = (5, 6, 6, 6, 6, 9, 10, 12, 13)

    def check(self, data: bytes) -> None:
        pair = ProtocolPair()
        self._views = _send_tensors(pair.up)
        for message in _exchanges.decode(data).messages:
            call = pair.server.take_request(message)
            if isinstance(call, Call):
                self._look_at(call)
            elif call is not None:
                check_message(call)

    def _look_at(self, call: Call) -> None:
        check_count(call.call_id)
        assert call.is_answered or not call.window
        assert 0 <= call.window <= MAX_WINDOW
        check_text(MAX_NAME_CHARACTERS, call.method)
        assert (type(call.arguments), type(call.keywords)) == (tuple, dict)
        check_text(MOST_MESSAGE_BYTES, *call.keywords)
        for value in (*call.arguments, *call.keywords.values()):
            check_value(value, 2, snapshot=False)
